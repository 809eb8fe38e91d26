// Multi-scale deformable attention for NVIDIA GPUs (compute capability 6 and up).
//
// One warp serves one head of one query. Its 32 lanes are four groups of eight: group k reads corner k of every point,
// and its lanes share the cell's channels, V at a time, so that a cell of 32 floats is one load of 128 bytes. Forward
// adds the groups up once per query; backward turns a corner's dot product with the gradient into one number by
// shuffles, so only the value gradient, which several queries share, needs atomics.
//
// Needs no header but CUDA's own. tests/test_ops.py runs it on the CPU too, with tests/warp.h for a device.
#include <type_traits>

#include "taps.h"

constexpr int kWarps = 4;      // per block: neighbouring heads of a query, or neighbouring queries
constexpr int kMaxLevels = 32;
constexpr unsigned kAll = 0xffffffff;

struct Sizes {
  int64_t B, S, M, D, N, G, P;
};

struct Levels {
  int32_t H[kMaxLevels], W[kMaxLevels], start[kMaxLevels];
};

template <typename S, int V>
struct alignas(V * sizeof(S)) Pack {  // V neighbouring channels, one load
  S v[V];
};

template <typename T, int V>
__device__ void atomic_add(T* to, const T* x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (V == 4 && sizeof(T) == 4)
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
  else
#endif
    for (int i = 0; i < V; ++i) atomicAdd(to + i, x[i]);
}

// The cell of corner k, without indexing registers by a variable.
template <typename N>
HOST_DEVICE int64_t corner_cell(const Tap<N>& tap, int k) {
  const int32_t top = k & 1 ? tap.cell[1] : tap.cell[0], bottom = k & 1 ? tap.cell[3] : tap.cell[2];
  return k & 2 ? bottom : top;
}

template <typename T, typename S, int V>
__global__ void forward_kernel(Sizes z, Levels levels, const S* value, const T* locations, const T* attention, S* out) {
  const int lane = threadIdx.x % 32, corner = lane / 8, part = lane % 8;
  const int64_t first = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t at = first; at < z.B * z.N * z.M; at += int64_t(gridDim.x) * kWarps) {
    const S* head = value + (at / (z.N * z.M) * z.S * z.M + at % z.M) * z.D;
    for (int64_t base = 0; base < z.D; base += 8 * V) {  // the same for all lanes: they meet at the shuffles
      const int64_t c = base + part * V;
      T sum[V] = {};
      int64_t k = at * z.G * z.P;
      for (int g = 0; g < z.G; ++g)
        for (int p = 0; p < z.P; ++p, ++k) {
          const auto tap = make_tap<Single<T>>(locations[2 * k], locations[2 * k + 1], levels.H[g], levels.W[g],
                                               levels.start[g]);
          const int64_t cell = corner_cell(tap, corner);
          if (cell < 0 || c >= z.D) continue;
          const T weight = attention[k] * corner_weight(tap.fx, tap.fy, corner);
          const auto x = *reinterpret_cast<const Pack<S, V>*>(head + cell * z.M * z.D + c);
          for (int i = 0; i < V; ++i) sum[i] += weight * widen(x.v[i]);
        }
      for (int i = 0; i < V; ++i) {
        sum[i] += __shfl_xor_sync(kAll, sum[i], 8);
        sum[i] += __shfl_xor_sync(kAll, sum[i], 16);
      }
      if (corner || c >= z.D) continue;
      Pack<S, V> result;
      for (int i = 0; i < V; ++i) narrow(sum[i], result.v[i]);
      *reinterpret_cast<Pack<S, V>*>(out + at * z.D + c) = result;
    }
  }
}

template <typename T, typename S, int V>
__global__ void backward_kernel(Sizes z, Levels levels, const S* out_grad, const S* value, const T* locations,
                                const T* attention, T* value_grad, T* location_grad, T* attention_grad) {
  const int lane = threadIdx.x % 32, corner = lane / 8, part = lane % 8;
  const int64_t first = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t at = first; at < z.B * z.N * z.M; at += int64_t(gridDim.x) * kWarps) {
    const int64_t head = (at / (z.N * z.M) * z.S * z.M + at % z.M) * z.D;
    int64_t k = at * z.G * z.P;
    for (int g = 0; g < z.G; ++g)
      for (int p = 0; p < z.P; ++p, ++k) {
        const auto tap = make_tap<Single<T>>(locations[2 * k], locations[2 * k + 1], levels.H[g], levels.W[g],
                                             levels.start[g]);
        const int64_t cell = corner_cell(tap, corner), row = head + cell * z.M * z.D;
        const T weight = attention[k] * corner_weight(tap.fx, tap.fy, corner);
        T dot = 0;
        for (int64_t c = part * V; cell >= 0 && c < z.D; c += 8 * V) {
          const auto grad = *reinterpret_cast<const Pack<S, V>*>(out_grad + at * z.D + c);
          const auto x = *reinterpret_cast<const Pack<S, V>*>(value + row + c);
          T spread[V];
          for (int i = 0; i < V; ++i) {
            dot += widen(grad.v[i]) * widen(x.v[i]);
            spread[i] = weight * widen(grad.v[i]);
          }
          if (value_grad) atomic_add<T, V>(value_grad + row + c, spread);
        }
        for (int step = 1; step < 8; step *= 2) dot += __shfl_xor_sync(kAll, dot, step);
        T dots[4];
        for (int i = 0; i < 4; ++i) dots[i] = __shfl_sync(kAll, dot, 8 * i);
        const auto grad = point_gradient<Single<T>>(dots, tap.fx, tap.fy, attention[k], levels.H[g], levels.W[g]);
        if (lane == 0) location_grad[2 * k] = grad.x;
        if (lane == 1) location_grad[2 * k + 1] = grad.y;
        if (lane == 2) attention_grad[k] = grad.weight;
      }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------------------------------

#ifdef __CPU_SHIM__
#define LAUNCH(kernel, grid, stream, ...) (void)stream, shim::launch(grid, 32 * kWarps, [=] { kernel(__VA_ARGS__); })
const char* use_device_of(const void*) { return nullptr; }
const char* last_error() { return nullptr; }
#else
#define LAUNCH(kernel, grid, stream, ...) kernel<<<grid, 32 * kWarps, 0, (cudaStream_t)stream>>>(__VA_ARGS__)
const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }
const char* last_error() { return message(cudaGetLastError()); }
const char* use_device_of(const void* p) {  // this runtime is linked in, and knows nothing of PyTorch's choice
  cudaPointerAttributes at;
  const cudaError_t error = cudaPointerGetAttributes(&at, p);
  return error == cudaSuccess ? message(cudaSetDevice(at.device)) : message(error);
}
#endif

// Calls f(T(), S(), V) for the value type (0 float, 1 double, 2 bfloat16, 3 half; T is what sums are kept in) and the
// number of channels to load at once.
template <typename F>
const char* dispatch(int type, const int64_t* sizes, const int64_t* shapes, const void* value, const void* row, F f) {
  Sizes z;
  memcpy(&z, sizes, sizeof z);
  Levels levels = {};
  if (z.G > kMaxLevels) return "more than 32 levels";
  int64_t cells = 0;
  for (int64_t g = 0; g < z.G; ++g) {
    levels.H[g] = int32_t(shapes[2 * g]), levels.W[g] = int32_t(shapes[2 * g + 1]), levels.start[g] = int32_t(cells);
    cells += shapes[2 * g] * shapes[2 * g + 1];
  }
  const int64_t blocks = (z.B * z.N * z.M + kWarps - 1) / kWarps;
  if (!blocks) return nullptr;
  if (const char* error = use_device_of(value)) return error;
  const unsigned grid = unsigned(blocks < 0x7fffffff ? blocks : 0x7fffffff);
  const auto typed = [&](auto t, auto s) {
    constexpr int wide = sizeof(t) == 8 ? 2 : 4;
    if (z.D % wide || (uintptr_t(value) | uintptr_t(row)) % (wide * sizeof(s)))
      f(z, levels, grid, t, s, std::integral_constant<int, 1>());
    else
      f(z, levels, grid, t, s, std::integral_constant<int, wide>());
  };
  if (type == 0) typed(float(), float());
  if (type == 1) typed(double(), double());
  if (type == 2) typed(float(), BFloat16());
  if (type == 3) typed(float(), Half());
  if (type < 0 || type > 3) return "no kernel for this type";
  return last_error();
}

// All arrays are dense and in deform_attn's layout, sizes is {B, S, M, D, N, G, P}. Locations and weights are double if
// values are, else float. They return null or what went wrong.
extern "C" const char* deform_attn_forward(int type, const int64_t* sizes, const int64_t* shapes, const void* value,
                                           const void* locations, const void* attention, void* out, int64_t stream) {
  const auto launch = [=](auto z, auto levels, unsigned grid, auto t, auto s, auto v) {
    using T = decltype(t);
    using S = decltype(s);
    const auto kernel = forward_kernel<T, S, decltype(v)::value>;
    LAUNCH(kernel, grid, stream, z, levels, (const S*)value, (const T*)locations, (const T*)attention, (S*)out);
  };
  return dispatch(type, sizes, shapes, value, out, launch);
}

// value_grad: zeros of the type that sums are kept in, or null: not wanted.
extern "C" const char* deform_attn_backward(int type, const int64_t* sizes, const int64_t* shapes,
                                            const void* out_grad, const void* value, const void* locations,
                                            const void* attention, void* value_grad, void* location_grad,
                                            void* attention_grad, int64_t stream) {
  const auto launch = [=](auto z, auto levels, unsigned grid, auto t, auto s, auto v) {
    using T = decltype(t);
    using S = decltype(s);
    const auto kernel = backward_kernel<T, S, decltype(v)::value>;
    LAUNCH(kernel, grid, stream, z, levels, (const S*)out_grad, (const S*)value, (const T*)locations,
           (const T*)attention, (T*)value_grad, (T*)location_grad, (T*)attention_grad);
  };
  return dispatch(type, sizes, shapes, value, out_grad, launch);
}
