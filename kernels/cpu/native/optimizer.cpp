// What stands between a gradient and the weights: sums of products over whole tensors, and AdamW's update.
//
// Every operation is an IEEE 754 one, rounded once, in an order that neither threads nor vectors can change; so one
// gradient gives one update on every processor. (torch's square root of fp32 is a library's, and not correctly rounded
// on AVX-512; its sums split by the number of threads.)
#include "vec.h"

typedef double vd8 __attribute__((vector_size(64), aligned(8), may_alias));
typedef float vf8 __attribute__((vector_size(32), aligned(4), may_alias));

constexpr int64_t BLOCK = 4096;  // elements that one sum runs over; the blocks' sums are added in ascending order
constexpr int64_t DOUBLES = 8;   // virtual lanes of a block's sum

// sum a[i] b[i] over n elements in fp64; partial [ceil(n / BLOCK)], out [1]. A product of two fp32 numbers is exact in
// fp64. In a block lane l adds elements l, l + 8, …; the lanes are joined as l and l + 4, then l + 2, then l + 1.
EXPORT int64_t dot_f32(const float* a, const float* b, int64_t n, double* partial, double* out) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  parallel(blocks, double(n) * 0.5, [=](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) {
      const int64_t first = k * BLOCK, last = first + BLOCK < n ? first + BLOCK : n;
      vd8 sum = {};
      int64_t i = first;
      for (; i + DOUBLES <= last; i += DOUBLES)
        sum += __builtin_convertvector(*(const vf8*)(a + i), vd8) * __builtin_convertvector(*(const vf8*)(b + i), vd8);
      for (int64_t lane = 0; i + lane < last; lane++) sum[lane] += double(a[i + lane]) * double(b[i + lane]);
      for (int step = DOUBLES / 2; step; step /= 2)
        for (int lane = 0; lane < step; lane++) sum[lane] += sum[lane + step];
      partial[k] = sum[0];
    }
  });
  double total = 0.0;
  for (int64_t k = 0; k < blocks; k++) total += partial[k];
  *out = total;
  return 0;
}

// AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on n fp32 elements, in place:
//   p = p keep;  m = m + (g - m) new1 + 0;  v = v old2 + (g g) new2;  p = p - (m / (sqrt(v) / root + eps)) rate
// with keep = 1 - lr weight_decay, new1 = 1 - beta1, old2 = beta2, new2 = 1 - beta2, rate = lr / (1 - beta1^t) and
// root = sqrt(1 - beta2^t). The added zero makes a moment of -0 one of +0, so that a state gathered from ranks by adding
// zeros keeps its bits.
EXPORT int64_t adamw_f32(float* p, const float* g, float* m, float* v, int64_t n, float keep, float new1, float old2,
                         float new2, float rate, float root, float eps) {
  parallel(n, double(n) * 1.0, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += W) {
      const int count = end - i < W ? int(end - i) : W;
      const vf grad = load(g + i, count);
      vf first = load(m + i, count), second = load(v + i, count);
      first = (first + (grad - first) * splat(new1)) + zero();
      second = second * splat(old2) + (grad * grad) * splat(new2);
      const vf away = first / (sqrt(second) / splat(root) + splat(eps));
      store(m + i, first, count);
      store(v + i, second, count);
      store(p + i, load(p + i, count) * splat(keep) - away * splat(rate), count);
    }
  });
  return 0;
}
