// The arithmetic of one sampled point, shared by the CPU and the CUDA kernel (Deformable DETR, Eq. 3).
//
// A point at (x, y) cells mixes the four cells around it. Corner k of a point is the cell k & 1 columns right of and
// k >> 1 rows below (floor(x), floor(y)); corners outside the map, and all corners of a point whose location is not
// finite or a cell or more outside, are cell -1, which reads as zero.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

// The functions below serve single numbers (Single, for CUDA) and vectors of them (Lanes in cpu.cpp): N names the real
// type, the integer type and three operations. A condition is an integer, -1 or 0, or a vector of them.
template <typename T>
struct Single {
  typedef T Real;
  typedef int32_t Int;
  static HOST_DEVICE Int truncated(T x) { return Int(x); }
  static HOST_DEVICE T real(Int i) { return T(i); }
  template <typename A>
  static HOST_DEVICE Int less(A a, A b) {
    return -Int(a < b);
  }
};

template <typename N>
struct Tap {
  typename N::Real fx, fy;  // how far the point is from corner 0, in cells
  typename N::Int cell[4];  // index into the joined maps of all levels
};

// x, y: location in [0, 1] of a map of H rows and W columns, whose first cell is `start`. A NaN is less than nothing.
template <typename N>
HOST_DEVICE Tap<N> make_tap(typename N::Real x, typename N::Real y, typename N::Int H, typename N::Int W,
                            typename N::Int start) {
  typedef typename N::Real T;
  typedef typename N::Int I;
  const T w = N::real(W), h = N::real(H), zero = w - w, before = zero - 1;
  x = x * w - 0.5f;
  y = y * h - 0.5f;
  const I inside = N::less(before, x) & N::less(x, w) & N::less(before, y) & N::less(y, h);
  x = inside ? x : zero;
  y = inside ? y : zero;
  I x0 = N::truncated(x), y0 = N::truncated(y);
  x0 += N::less(x, N::real(x0));  // floor
  y0 += N::less(y, N::real(y0));
  const I left = inside & ~(x0 >> 31), right = inside & N::less(x0 + 1, W);
  const I top = ~(y0 >> 31), bottom = N::less(y0 + 1, H);
  const I cell = start + y0 * W + x0;
  Tap<N> tap;
  tap.fx = x - N::real(x0);
  tap.fy = y - N::real(y0);
  tap.cell[0] = (left & top & (cell + 1)) - 1;
  tap.cell[1] = (right & top & (cell + 2)) - 1;
  tap.cell[2] = (left & bottom & (cell + W + 1)) - 1;
  tap.cell[3] = (right & bottom & (cell + W + 2)) - 1;
  return tap;
}

// The share of corner k in the mix.
template <typename T>
HOST_DEVICE T corner_weight(T fx, T fy, int k) {
  return (k & 1 ? fx : 1 - fx) * (k & 2 ? fy : 1 - fy);
}

template <typename T>
struct PointGradient {
  T x, y, weight;
};

// dot[k] = <gradient of the output, corner k's cell>; a: the point's attention weight.
template <typename N, typename T, typename I>
HOST_DEVICE PointGradient<T> point_gradient(const T* dot, T fx, T fy, T a, I H, I W) {
  const T along_top = dot[1] - dot[0], along_bottom = dot[3] - dot[2];
  const T top = dot[0] + fx * along_top, bottom = dot[2] + fx * along_bottom;
  PointGradient<T> g;
  g.x = a * N::real(W) * (along_top + fy * (along_bottom - along_top));
  g.y = a * N::real(H) * (bottom - top);
  g.weight = top + fy * (bottom - top);
  return g;
}

HOST_DEVICE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

HOST_DEVICE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

HOST_DEVICE float widen(float x) { return x; }
HOST_DEVICE double widen(double x) { return x; }
HOST_DEVICE float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
HOST_DEVICE float widen(Half x) {  // shifting the exponent field leaves it 112 too small, 224 for infinity and NaN
  const float size = bits_to_float(uint32_t(x.bits & 0x7fff) << 13) * bits_to_float(0x77800000);  // 2^112
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return bits_to_float(float_to_bits(size) | special | uint32_t(x.bits & 0x8000) << 16);
}

HOST_DEVICE void narrow(float x, float& out) { out = x; }
HOST_DEVICE void narrow(double x, double& out) { out = x; }
HOST_DEVICE void narrow(float x, BFloat16& out) {  // to nearest, ties to even; a NaN stays one
  const uint32_t bits = float_to_bits(x);
  out.bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
HOST_DEVICE void narrow(float x, Half& out) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size >= 0x47800000) {  // 65536 and more, infinity, NaN
    out.bits = uint16_t(sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00));
  } else if (size < 0x38800000) {  // below 2^-14: adding 1/2 lets the addition round to multiples of 2^-24
    out.bits = uint16_t(sign | (float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000));
  } else {
    out.bits = uint16_t(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
  }
}
