// Multi-scale deformable attention for CPUs: plain C++ with the compiler's vector types, no library but OpenMP.
//
// One task owns one head of one image. It first copies the head's cells next to each other (in the caller's layout they
// are M * D apart, which leaves most of the cache unused), padded to whole vectors, after a row of zeros that stands
// for everything outside the maps. Each query then computes its taps once, all points side by side in vector lanes, and
// reads four rows per point. The task also owns the head's value gradient, so nothing needs an atomic and the sums do
// not depend on the number of threads. Few queries on large maps skip the copy and read the caller's rows.
#ifdef _OPENMP
#include <omp.h>
#endif
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "taps.h"

#if defined(__AVX512F__)
constexpr int kBytes = 64;  // of one vector
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

constexpr int64_t kAhead = 6;  // queries to prefetch ahead

typedef float Floats __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef int64_t Longs __attribute__((vector_size(kBytes)));
template <typename T>
using Vec = std::conditional_t<std::is_same_v<T, float>, Floats,
                               std::conditional_t<std::is_same_v<T, double>, Doubles,
                                                  std::conditional_t<std::is_same_v<T, int32_t>, Ints, Longs>>>;
template <typename T>
using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <typename T>
constexpr int kLanes = kBytes / int(sizeof(T));
template <typename T, typename S>
constexpr int kRow = kLanes<T> * int(sizeof(T) / sizeof(S));  // rows of type S are padded to multiples of this

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// ---------------------------------------------------------------------------------------------------------------------
// Vectors
// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
struct Lanes {  // one vector at a time through taps.h
  typedef Vec<T> Real;
  typedef Vec<Lane<T>> Int;
  static Int truncated(Real x) { return __builtin_convertvector(x, Int); }
  static Real real(Int i) { return __builtin_convertvector(i, Real); }
  template <typename A>
  static Int less(A a, A b) {
    return a < b;
  }
};

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}

// n vectors of a row, in the order its type makes cheap. Floats and doubles: as they lie. bfloat16, two to a lane: the
// even channels of two vectors' worth, then the odd ones, so that widening is one shift or one mask.
template <int n, typename T>
inline void load_row(const T* p, Vec<T>* v) {
  for (int i = 0; i < n; ++i) v[i] = load(p + i * kLanes<T>);
}

template <int n, typename T>
inline void store_row(T* p, const Vec<T>* v) {
  for (int i = 0; i < n; ++i) store(p + i * kLanes<T>, v[i]);
}

typedef uint32_t Bits __attribute__((vector_size(kBytes)));

template <int n>
inline void load_row(const BFloat16* p, Floats* v) {
  for (int i = 0; i < n; i += 2) {
    Bits both;
    memcpy(&both, p + i * kLanes<float>, sizeof both);
    v[i] = (Floats)(both << 16), v[i + 1] = (Floats)(both & 0xffff0000);
  }
}

inline Bits rounded(Floats x) {  // narrow() of taps.h, result in the upper half
  const Bits bits = (Bits)x;
  return x == x ? bits + 0x7fff + (bits >> 16 & 1) : Bits{} + 0x7fc00000;
}

template <int n>
inline void store_row(BFloat16* p, const Floats* v) {
  for (int i = 0; i < n; i += 2) {
    const Bits both = rounded(v[i]) >> 16 | (rounded(v[i + 1]) & 0xffff0000);
    memcpy(static_cast<void*>(p + i * kLanes<float>), &both, sizeof both);
  }
}

// Calls f(number of vectors, first channel) until a row of `width` channels is done.
template <typename T, typename S, typename F>
inline void over_channels(int64_t width, F f) {
  int64_t c = 0;
  for (; c + 4 * kLanes<T> <= width; c += 4 * kLanes<T>) f(std::integral_constant<int, 4>(), c);
  for (; c + 2 * kLanes<T> <= width; c += 2 * kLanes<T>) f(std::integral_constant<int, 2>(), c);
  if constexpr (sizeof(S) == sizeof(T))
    if (c < width) f(std::integral_constant<int, 1>(), c);
}

// a joined with b holds runs of 2 * width numbers each: their first (odd = 0) or second (odd = 1) halves.
template <typename T, int width, int odd, size_t... i>
inline Vec<T> halves(Vec<T> a, Vec<T> b, std::index_sequence<i...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (int(i) / width * 2 * width + odd * width + int(i) % width)...);
#else
  return __builtin_shuffle(a, b, Vec<Lane<T>>{Lane<T>(int(i) / width * 2 * width + odd * width + int(i) % width)...});
#endif
}

// n vectors -> one that holds, vector after vector, lanes / n partial sums of each; with n lanes, whole sums.
template <typename T, int n>
inline Vec<T> fold(const Vec<T>* rows) {
  if constexpr (n == 1) {
    return rows[0];
  } else {
    constexpr auto lanes = std::make_index_sequence<kLanes<T>>();
    const Vec<T> a = fold<T, n / 2>(rows), b = fold<T, n / 2>(rows + n / 2);
    return halves<T, kLanes<T> / n, 0>(a, b, lanes) + halves<T, kLanes<T> / n, 1>(a, b, lanes);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// One query of one head
// ---------------------------------------------------------------------------------------------------------------------

struct Sizes {
  int64_t B, S, M, D, N, G, P;  // as in deform_attn's docstring
  int64_t points() const { return G * P; }
};

// Rows of one head: row c of `first`, `stride` elements apart; cells outside the maps are the row `outside`.
template <typename S>
struct Rows {
  S* first;
  int64_t stride;
  S* outside;
  S* row(int64_t cell) const { return cell < 0 ? outside : first + cell * stride; }
};

// The level of each point and the taps of the query at hand, one array per quantity, padded to whole vectors.
template <typename T, typename S>
struct Query {
  static constexpr int lanes = kLanes<T>;
  const int64_t points, padded, width;     // width: channels, padded
  std::vector<Lane<T>> H, W, start;        // of each point's level
  std::vector<Lane<T>> cell;               // [corner][point]
  std::vector<T> x, y, attention, fx, fy;  // of each point; backward leaves gradients in the first three
  std::vector<T> weight, dot;              // [corner][point]: bilinear times attention; <grad, cell>
  std::vector<S> row;                      // the output or its gradient, padded

  Query(const Sizes& z, const int64_t* shapes)
      : points(z.G * z.P), padded(round_up(points, lanes)), width(round_up(z.D, kRow<T, S>)), H(padded), W(padded),
        start(padded), cell(4 * padded), x(padded), y(padded), attention(padded), fx(padded), fy(padded),
        weight(4 * padded), dot(4 * padded), row(width) {
    int64_t first = 0;
    for (int64_t p = 0; p < points; ++p) {
      const int64_t g = p / z.P;
      H[p] = Lane<T>(shapes[2 * g]), W[p] = Lane<T>(shapes[2 * g + 1]), start[p] = Lane<T>(first);
      if (p % z.P == z.P - 1) first += shapes[2 * g] * shapes[2 * g + 1];
    }
  }

  // The query's taps from its locations (x, y) and attention weights.
  void find(const T* __restrict location, const T* __restrict weights) {
    T *__restrict x = this->x.data(), *__restrict y = this->y.data(), *__restrict a = attention.data();
    const int64_t n = points;
    for (int64_t p = 0; p < n; ++p) x[p] = location[2 * p], y[p] = location[2 * p + 1], a[p] = weights[p];
    for (int64_t p = 0; p < padded; p += lanes) {
      const auto tap = make_tap<Lanes<T>>(load(x + p), load(y + p), load(&H[p]), load(&W[p]), load(&start[p]));
      store(&fx[p], tap.fx), store(&fy[p], tap.fy);
      for (int k = 0; k < 4; ++k) {
        store(&cell[k * padded + p], tap.cell[k]);
        store(&weight[k * padded + p], load(a + p) * corner_weight(tap.fx, tap.fy, k));
      }
    }
  }

  // out[c ... c + n vectors) = sum over points and corners of weight * row
  template <int n>
  void mix(const Rows<const S>& value, int64_t c, S* out) {
    Vec<T> sum[4][n] = {};
    for (int64_t p = 0; p < points; ++p)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        Vec<T> v[n];
        load_row<n>(value.row(cell[k * padded + p]) + c, v);
        const T w = weight[k * padded + p];
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) sum[k][i] += w * v[i];
      }
    for (int i = 0; i < n; ++i) sum[0][i] = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
    store_row<n>(out + c, sum[0]);
  }

  // dot[corner][point] = <grad, row>; the value gradient's rows += weight * grad. From the second c on, dot adds up.
  template <int n, bool wanted>
  void spread(const Rows<const S>& value, const Rows<T>& value_grad, const S* grad, int64_t c) {
    constexpr int block = lanes < 4 ? 1 : lanes / 4;  // points whose 4 dot products each fill a vector
    const Lane<T>* __restrict cells = cell.data();
    const T *__restrict weights = weight.data();
    T* __restrict dots = dot.data();
    const int64_t points = this->points, padded = this->padded;
    Vec<T> g[n];
    load_row<n>(grad + c, g);
    for (int64_t p = 0; p < points; p += block) {
      Vec<T> sum[4 * block];
#pragma GCC unroll 4
      for (int q = 0; q < block; ++q)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const int64_t at = k * padded + p + q;
          Vec<T> v[n];
          load_row<n>(value.row(cells[at]) + c, v);
          Vec<T> s = g[0] * v[0];
#pragma GCC unroll 4
          for (int i = 1; i < n; ++i) s += g[i] * v[i];
          sum[k * block + q] = s;
          if constexpr (wanted) {
            T* to = value_grad.row(cells[at]) + c;
            const T w = weights[at];
#pragma GCC unroll 4
            for (int i = 0; i < n; ++i) store(to + i * lanes, load(to + i * lanes) + w * g[i]);
          }
        }
      T each[4 * block];
      if constexpr (lanes < 4)
        for (int k = 0; k < 4; ++k) each[k] = sum[k][0] + sum[k][1];
      else
        store(each, fold<T, lanes>(sum));
      for (int k = 0; k < 4; ++k)
        for (int q = 0; q < block; ++q) {
          T& to = dots[k * padded + p + q];
          to = c ? to + each[k * block + q] : each[k * block + q];
        }
    }
  }

  void forward(const Rows<const S>& value, int64_t D, S* out) {
    S* to = D == width ? out : row.data();
    over_channels<T, S>(width, [&](auto n, int64_t c) { mix<n.value>(value, c, to); });
    if (to != out) memcpy(static_cast<void*>(out), to, D * sizeof(S));
  }

  void backward(const Rows<const S>& value, const Rows<T>* value_grad, int64_t D, const S* grad,
                T* __restrict location_grad, T* __restrict attention_grad) {
    if (D != width) grad = static_cast<S*>(memcpy(static_cast<void*>(row.data()), grad, D * sizeof(S)));
    if (value_grad)
      over_channels<T, S>(width, [&](auto n, int64_t c) { spread<n.value, true>(value, *value_grad, grad, c); });
    else
      over_channels<T, S>(width, [&](auto n, int64_t c) { spread<n.value, false>(value, {}, grad, c); });
    for (int64_t p = 0; p < padded; p += lanes) {
      Vec<T> d[4];
      for (int k = 0; k < 4; ++k) d[k] = load(&dot[k * padded + p]);
      const auto g = point_gradient<Lanes<T>>(d, load(&fx[p]), load(&fy[p]), load(&attention[p]), load(&H[p]),
                                              load(&W[p]));
      store(&x[p], g.x), store(&y[p], g.y), store(&attention[p], g.weight);
    }
    const T *__restrict gx = x.data(), *__restrict gy = y.data(), *__restrict ga = attention.data();
    const int64_t n = points;
    for (int64_t p = 0; p < n; ++p)
      location_grad[2 * p] = gx[p], location_grad[2 * p + 1] = gy[p], attention_grad[p] = ga[p];
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Heads and tasks
// ---------------------------------------------------------------------------------------------------------------------

// Asks for huge pages below a large fresh array: the kernel's work on 4 KiB pages costs more than the arithmetic.
inline void advise_huge(void* p, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 4096, end = (uintptr_t(p) + bytes) / page * page;
  const uintptr_t first = (uintptr_t(p) + page - 1) / page * page;
  if (bytes >= (size_t(4) << 20) && end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

template <typename S>
struct Buffer {  // uninitialised
  S* data = nullptr;
  explicit Buffer(size_t count) {
    const size_t bytes = (count * sizeof(S) + 4095) / 4096 * 4096;
    data = static_cast<S*>(std::aligned_alloc(4096, bytes));
    if (!data) throw std::bad_alloc();
    advise_huge(data, bytes);
  }
  Buffer(Buffer&& other) : data(std::exchange(other.data, nullptr)) {}
  ~Buffer() { std::free(data); }
};

// What one thread needs: a query's taps and the packed rows of a head, the first of them zeros.
template <typename T, typename S>
struct Worker {
  Query<T, S> query;
  Buffer<S> value;
  Buffer<T> grad;
  Worker(const Sizes& z, const int64_t* shapes, bool pack, bool pack_grad)
      : query(z, shapes), value((pack ? z.S + 1 : 1) * query.width), grad((pack_grad ? z.S + 1 : 1) * query.width) {
    memset(static_cast<void*>(value.data), 0, query.width * sizeof(S));
  }

  Rows<const S> pack(const S* first, const Sizes& z) {
    const int64_t width = query.width;
    for (int64_t s = 0; s < z.S; ++s) {
      S* row = value.data + (s + 1) * width;
      memcpy(static_cast<void*>(row), first + s * z.M * z.D, z.D * sizeof(S));
      if (width > z.D) memset(static_cast<void*>(row + z.D), 0, (width - z.D) * sizeof(S));
    }
    return {value.data + width, width, value.data};
  }

  void unpack_grad(const Sizes& z, S* first) {
    for (int64_t s = 0; s < z.S; ++s) {
      const T* from = grad.data + (s + 1) * query.width;
      S *to = first + s * z.M * z.D, *whole = z.D == query.width ? to : query.row.data();
      over_channels<T, S>(query.width, [&](auto n, int64_t c) {
        Vec<T> v[n.value];
        load_row<n.value>(from + c, v);
        store_row<n.value>(whole + c, v);
      });
      if (whole != to) memcpy(static_cast<void*>(to), whole, z.D * sizeof(S));
    }
  }
};

// Fetches what the query `ahead` of this one reads once and in strides that no hardware foresees.
template <int write, typename X>
inline void prefetch(const X* p, int64_t count) {
  for (int64_t i = 0; i < count * int64_t(sizeof(X)); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + i, write);
}

struct Task {
  int64_t b, first_head, last_head, first_query, last_query;  // without the last ones
};

// Splits every image into `heads` groups of heads and `queries` groups of queries.
std::vector<Task> make_tasks(const Sizes& z, int64_t heads, int64_t queries) {
  std::vector<Task> tasks;
  for (int64_t b = 0; b < z.B; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t q = 0; q < queries; ++q)
        tasks.push_back({b, h * z.M / heads, (h + 1) * z.M / heads, q * z.N / queries, (q + 1) * z.N / queries});
  return tasks;
}

// Copying a head costs as much as some points do, so it pays from about one point per cell on.
template <typename T, typename S>
bool worth_packing(const Sizes& z) {
  return z.D % kRow<T, S> || z.N * z.points() >= z.S;
}

// One per thread that has something to do.
template <typename T, typename S>
std::vector<Worker<T, S>> make_workers(const Sizes& z, const int64_t* shapes, const std::vector<Task>& tasks,
                                       int threads, bool pack, bool pack_grad) {
  std::vector<Worker<T, S>> workers;
  for (size_t t = 0; t < std::min(tasks.size(), size_t(threads)); ++t)
    workers.emplace_back(z, shapes, pack, pack_grad);
  return workers;
}

template <typename W, typename F>
void in_parallel(const std::vector<Task>& tasks, std::vector<W>& workers, F f) {
  if (tasks.empty()) return;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(workers.size())) if (workers.size() > 1)
  for (size_t t = 0; t < tasks.size(); ++t) f(tasks[t], workers[omp_get_thread_num()]);
#else
  for (const Task& task : tasks) f(task, workers[0]);
#endif
}

template <typename T, typename S>
void forward(const Sizes& z, const int64_t* shapes, const S* value, const T* locations, const T* attention, S* out,
             int threads) {
  const bool pack = worth_packing<T, S>(z);
  const int64_t K = z.points(), heads = std::max<int64_t>(z.B * z.M, 1);
  const auto tasks = pack ? make_tasks(z, z.M, (threads + heads - 1) / heads) : make_tasks(z, 1, threads);
  auto workers = make_workers<T, S>(z, shapes, tasks, threads, pack, false);
  const int64_t last = z.B * z.N * z.M - 1;
  advise_huge(out, z.B * z.N * z.M * z.D * sizeof(S));
  in_parallel(tasks, workers, [&](const Task& task, Worker<T, S>& worker) {
    const S* image = value + task.b * z.S * z.M * z.D;
    Rows<const S> rows = {image, z.M * z.D, worker.value.data};
    if (pack) rows = worker.pack(image + task.first_head * z.D, z);
    for (int64_t n = task.first_query; n < task.last_query; ++n)
      for (int64_t m = task.first_head; m < task.last_head; ++m) {
        const int64_t at = (task.b * z.N + n) * z.M + m;
        const int64_t next = std::min(at + kAhead * z.M, last);
        prefetch<0>(locations + 2 * next * K, 2 * K);
        prefetch<0>(attention + next * K, K);
        prefetch<1>(out + next * z.D, z.D);
        if (!pack) rows.first = image + m * z.D;
        worker.query.find(locations + 2 * at * K, attention + at * K);
        worker.query.forward(rows, z.D, out + at * z.D);
      }
  });
}

template <typename T, typename S>
void backward(const Sizes& z, const int64_t* shapes, const S* out_grad, const S* value, const T* locations,
              const T* attention, S* value_grad, T* location_grad, T* attention_grad, int threads) {
  constexpr bool same = std::is_same_v<T, S>;  // else the value gradient needs a wider buffer to add up in
  const bool pack = worth_packing<T, S>(z), buffer = pack || !same;
  const auto tasks = make_tasks(z, buffer ? z.M : std::min<int64_t>(z.M, threads), 1);
  auto workers = make_workers<T, S>(z, shapes, tasks, threads, pack, buffer && value_grad);
  const int64_t K = z.points(), count = z.B * z.N * z.M;
  if (value_grad) advise_huge(value_grad, z.B * z.S * z.M * z.D * sizeof(S));
  advise_huge(location_grad, 2 * count * K * sizeof(T)), advise_huge(attention_grad, count * K * sizeof(T));
  in_parallel(tasks, workers, [&](const Task& task, Worker<T, S>& worker) {
    const int64_t image = task.b * z.S * z.M * z.D, width = worker.query.width;
    Rows<const S> rows = {value + image, z.M * z.D, worker.value.data};
    Rows<T> grads = {worker.grad.data + width, width, worker.grad.data};
    if (pack) rows = worker.pack(value + image + task.first_head * z.D, z);
    if (value_grad && buffer) {
      memset(static_cast<void*>(worker.grad.data), 0, (z.S + 1) * width * sizeof(T));
    } else if (value_grad) {
      const int64_t heads = (task.last_head - task.first_head) * z.D;
      for (int64_t s = 0; s < z.S; ++s) {
        S* row = value_grad + image + s * z.M * z.D + task.first_head * z.D;
        memset(static_cast<void*>(row), 0, heads * sizeof(S));
      }
    }
    for (int64_t n = 0; n < z.N; ++n)
      for (int64_t m = task.first_head; m < task.last_head; ++m) {
        const int64_t at = (task.b * z.N + n) * z.M + m;
        const int64_t next = std::min(at + kAhead * z.M, count - 1);
        prefetch<0>(locations + 2 * next * K, 2 * K);
        prefetch<0>(attention + next * K, K);
        prefetch<0>(out_grad + next * z.D, z.D);
        prefetch<1>(location_grad + 2 * next * K, 2 * K);
        prefetch<1>(attention_grad + next * K, K);
        if (!pack) {
          rows.first = value + image + m * z.D;
          if constexpr (same) grads = {value_grad + image + m * z.D, z.M * z.D, worker.grad.data};
        }
        worker.query.find(locations + 2 * at * K, attention + at * K);
        worker.query.backward(rows, value_grad ? &grads : nullptr, z.D, out_grad + at * z.D,
                              location_grad + 2 * at * K, attention_grad + at * K);
      }
    if (value_grad && buffer) worker.unpack_grad(z, value_grad + image + task.first_head * z.D);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Entry points: type 0 = float, 1 = double, 2 = bfloat16 values with float locations and weights. All arrays are dense
// and in deform_attn's layout, sizes is {B, S, M, D, N, G, P}. They return null or what went wrong.
// ---------------------------------------------------------------------------------------------------------------------

template <typename F>
const char* guarded(int type, F f) {
  try {
    if (type == 0) return f(float(), float()), nullptr;
    if (type == 1) return f(double(), double()), nullptr;
    if (type == 2) return f(float(), BFloat16()), nullptr;
    return "no kernel for this type";
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}

extern "C" const char* deform_attn_forward(int type, const int64_t* sizes, const int64_t* shapes, const void* value,
                                           const void* locations, const void* attention, void* out, int64_t threads) {
  Sizes z;
  memcpy(&z, sizes, sizeof z);
  return guarded(type, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    forward(z, shapes, static_cast<const S*>(value), static_cast<const T*>(locations),
            static_cast<const T*>(attention), static_cast<S*>(out), int(threads));
  });
}

// value_grad may be null: not wanted.
extern "C" const char* deform_attn_backward(int type, const int64_t* sizes, const int64_t* shapes,
                                            const void* out_grad, const void* value, const void* locations,
                                            const void* attention, void* value_grad, void* location_grad,
                                            void* attention_grad, int64_t threads) {
  Sizes z;
  memcpy(&z, sizes, sizeof z);
  return guarded(type, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    backward(z, shapes, static_cast<const S*>(out_grad), static_cast<const S*>(value),
             static_cast<const T*>(locations), static_cast<const T*>(attention), static_cast<S*>(value_grad),
             static_cast<T*>(location_grad), static_cast<T*>(attention_grad), int(threads));
  });
}
