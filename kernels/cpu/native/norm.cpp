// RMS norm, forward and backward.
#include "vec.h"

// sum_i a[i] * b[i] on 16 virtual lanes: lane l takes i = l, l + 16, …; then the fixed tree.
template <class A, class B> INLINE float dot(const A* a, const B* b, int64_t n) {
  F16 acc = splat16(0.f);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) acc = fma(load16(a + i), load16(b + i), acc);
  if (i < n) acc = fma(load16(a + i, int(n - i)), load16(b + i, int(n - i)), acc);
  return sum(acc);
}

INLINE vf rounded(vf v, const float*) { return v; }
INLINE vf rounded(vf v, const bf16*) {
  bf16 lanes[W];
  store(lanes, v);
  return load(lanes);
}

INLINE float root_mean_square(float square, int64_t n, float eps) {
  return __builtin_sqrtf(square / float(n) + eps);
}

// x: rows of n values, row r at (r / inner) * outer_stride + (r % inner) * inner_stride -> y [rows, n]
template <class T>
INLINE void rms_norm(const T* x, int64_t outer_stride, int64_t inner, int64_t inner_stride, const T* weight, float eps,
                     T* y, int64_t rows, int64_t n) {
  parallel(rows, double(rows * (n + 16)) * 0.15, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T* row = x + r / inner * outer_stride + r % inner * inner_stride;
      T* out = y + r * n;
      vf scale = splat(root_mean_square(dot(row, row, n), n, eps));
      for (int64_t i = 0; i < n; i += W) {
        int m = n - i < W ? int(n - i) : W;
        store(out + i, rounded(load(row + i, m) / scale, row) * load(weight + i, m), m);
      }
    }
  });
}
EXPORT int64_t rms_norm_f32(const float* x, int64_t outer_stride, int64_t inner, int64_t inner_stride,
                            const float* weight, float eps, float* y, int64_t rows, int64_t n) {
  rms_norm(x, outer_stride, inner, inner_stride, weight, eps, y, rows, n);
  return 0;
}
EXPORT int64_t rms_norm_bf16(const bf16* x, int64_t outer_stride, int64_t inner, int64_t inner_stride,
                             const bf16* weight, float eps, bf16* y, int64_t rows, int64_t n) {
  rms_norm(x, outer_stride, inner, inner_stride, weight, eps, y, rows, n);
  return 0;
}

// With s = sqrt(mean(x^2) + eps) and g = weight * dy: dx = g / s - x * (g . x) / (n s^3); dweight = sum_t dy * x / s in
// ascending t. x, dy [rows, n]; dx or dweight may be null.
EXPORT int64_t rms_norm_backward(const float* x, const float* weight, float eps, const float* dy, float* dx,
                                 float* dweight, float* inverse, int64_t rows, int64_t n) {
  parallel(rows, double(rows * (n + 16)) * 0.3, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float *row = x + r * n, *grad = dy + r * n;
      F16 square = splat16(0.f), along = splat16(0.f);
      for (int64_t i = 0; i < n; i += LANES) {
        int m = n - i < LANES ? int(n - i) : LANES;
        F16 v = load16(row + i, m);
        square = fma(v, v, square);
        along = fma(mul(load16(weight + i, m), load16(grad + i, m)), v, along);
      }
      float inv = 1.f / root_mean_square(sum(square), n, eps);
      inverse[r] = inv;
      if (dx == nullptr) continue;
      vf scale = splat(inv), back = splat(-(sum(along) / float(n)) * inv * inv * inv);
      for (int64_t i = 0; i < n; i += W) {
        int m = n - i < W ? int(n - i) : W;
        vf g = load(weight + i, m) * load(grad + i, m);
        store(dx + r * n + i, fma(back, load(row + i, m), g * scale), m);
      }
    }
  });
  if (dweight == nullptr) return 0;
  parallel((n + LANES - 1) / LANES, double(rows * n) * 0.15, [=](int64_t begin, int64_t end) {
    int64_t c0 = begin * LANES, c1 = end * LANES < n ? end * LANES : n;
    memset(dweight + c0, 0, size_t(c1 - c0) * 4);
    for (int64_t r = 0; r < rows; r++) {
      vf scale = splat(inverse[r]);
      for (int64_t i = c0; i < c1; i += W) {
        int m = c1 - i < W ? int(c1 - i) : W;
        vf normed = load(x + r * n + i, m) * scale;
        store(dweight + i, fma(load(dy + r * n + i, m), normed, load(dweight + i, m)), m);
      }
    }
  });
  return 0;
}
