// Runs the kernels of cuda.cu on the CPU, for tests on machines without a GPU: block after block, warp after warp, the
// 32 lanes of a warp as fibres that take turns at every shuffle. A warp whose lanes do not all reach the same shuffle
// aborts, as a full-mask shuffle on a device would be undefined.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __CPU_SHIM__

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
constexpr int kLanes = 32, kStack = 1 << 17;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done;
  unsigned turn;  // shuffles so far; two slots in turn, so that a lane ahead does not overwrite what others still read
  unsigned char slot[2][8];
};

inline Lane lanes[kLanes];
inline ucontext_t scheduler;
inline int current;
inline unsigned warp;
inline std::function<void()> body;

inline void enter() {
  body();
  lanes[current].done = true;
  swapcontext(&lanes[current].context, &scheduler);
}

inline void run_warp() {
  for (auto& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = kStack;
    lane.context.uc_link = nullptr;
    lane.done = false;
    lane.turn = 0;
    makecontext(&lane.context, enter, 0);
  }
  for (int finished = 0; !finished;) {
    for (current = 0; current < kLanes; ++current) {
      threadIdx.x = warp * kLanes + current;
      swapcontext(&scheduler, &lanes[current].context);
      finished += lanes[current].done;
    }
    if (finished % kLanes) {
      std::fprintf(stderr, "warp.h: %d lanes ended while the others wait at a shuffle\n", finished);
      std::abort();
    }
  }
}

template <typename F>
void launch(unsigned grid, unsigned block, F f) {
  body = f;
  gridDim.x = grid, blockDim.x = block;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
    for (warp = 0; warp < block / kLanes; ++warp) run_warp();
}

template <typename T>
T shuffle(T x, int from) {
  Lane& self = lanes[current];
  const unsigned turn = self.turn++ % 2;
  std::memcpy(self.slot[turn], &x, sizeof x);
  swapcontext(&self.context, &scheduler);
  std::memcpy(&x, lanes[from].slot[turn], sizeof x);
  return x;
}
}  // namespace shim

template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  return shim::shuffle(x, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return shim::shuffle(x, shim::current ^ mask);
}
template <typename T>
void atomicAdd(T* to, T x) {
  *to += x;
}
