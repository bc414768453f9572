// SwiGLU and the experts' weighted sum, forward and backward; exp and log over arrays for tests and the self-check.
#include "vec.h"

EXPORT int64_t vec_exp(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    int m = n - i < W ? int(n - i) : W;
    store(y + i, exp(load(x + i, m)), m);
  }
  return 0;
}

EXPORT int64_t vec_log(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    int m = n - i < W ? int(n - i) : W;
    store(y + i, log(load(x + i, m)), m);
  }
  return 0;
}

INLINE vf silu(vf g) { return g / (splat(1.f) + exp(-g)); }

// x [rows, 2 * half] with row stride ldx -> y [rows, half]
template <class T> INLINE void swiglu(const T* x, int64_t ldx, T* y, int64_t rows, int64_t half) {
  parallel(rows, double(rows * half) * 0.7, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T* gate = x + r * ldx;
      const T* up = gate + half;
      T* out = y + r * half;
      for (int64_t i = 0; i < half; i += W) {
        int m = half - i < W ? int(half - i) : W;
        store(out + i, silu(load(gate + i, m)) * load(up + i, m), m);
      }
    }
  });
}
EXPORT int64_t swiglu_f32(const float* x, int64_t ldx, float* y, int64_t rows, int64_t half) {
  swiglu(x, ldx, y, rows, half);
  return 0;
}
EXPORT int64_t swiglu_bf16(const bf16* x, int64_t ldx, bf16* y, int64_t rows, int64_t half) {
  swiglu(x, ldx, y, rows, half);
  return 0;
}

// d silu(g)/dg = s (1 + g (1 - s)), s = 1 / (1 + exp(-g)). Where exp(-g) overflows, s = 0 and the gradient is 0.
EXPORT int64_t swiglu_backward(const float* x, int64_t ldx, const float* dy, float* dx, int64_t rows, int64_t half) {
  parallel(rows, double(rows * half) * 1.0, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float *gate = x + r * ldx, *up = gate + half, *d = dy + r * half;
      float* out = dx + r * 2 * half;
      for (int64_t i = 0; i < half; i += W) {
        int m = half - i < W ? int(half - i) : W;
        vf g = load(gate + i, m), u = load(up + i, m), dv = load(d + i, m);
        vf s = splat(1.f) / (splat(1.f) + exp(-g));
        vf slope = s * fma(g, splat(1.f) - s, splat(1.f));
        store(out + i, dv * u * slope, m);
        store(out + half + i, dv * (g * s), m);
      }
    }
  });
  return 0;
}

// y [rows * j, width], weight [rows, j] -> out [rows, width], one chain over j in ascending order
template <class T>
INLINE void moe_combine(const T* y, const float* weight, T* out, int64_t rows, int64_t j, int64_t width) {
  parallel(rows, double(rows * width * j) * 0.2, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float* w = weight + r * j;
      for (int64_t i = 0; i < width; i += W) {
        const T* p = y + r * j * width + i;
        int m = width - i < W ? int(width - i) : W;
        vf acc = zero();
        for (int64_t e = 0; e < j; e++) acc = fma(splat(w[e]), load(p + e * width, m), acc);
        store(out + r * width + i, acc, m);
      }
    }
  });
}
EXPORT int64_t moe_combine_f32(const float* y, const float* weight, float* out, int64_t rows, int64_t j, int64_t width) {
  moe_combine(y, weight, out, rows, j, width);
  return 0;
}
EXPORT int64_t moe_combine_bf16(const bf16* y, const float* weight, bf16* out, int64_t rows, int64_t j, int64_t width) {
  moe_combine(y, weight, out, rows, j, width);
  return 0;
}

// dy[t * j + e] = weight[t, e] * d[t]; dweight[t, e] = y[t * j + e] . d[t]
EXPORT int64_t moe_combine_backward(const float* y, const float* weight, const float* d, float* dy, float* dweight,
                                    int64_t rows, int64_t j, int64_t width) {
  parallel(rows * j, double(rows * width * j) * 0.3, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float *row = y + r * width, *grad = d + r / j * width;
      vf w = splat(weight[r]);
      F16 acc = splat16(0.f);
      for (int64_t i = 0; i < width; i += LANES) {
        int m = width - i < LANES ? int(width - i) : LANES;
        F16 g = load16(grad + i, m);
        acc = fma(load16(row + i, m), g, acc);
        for (int q = 0; q < PARTS; q++) g.part[q] = g.part[q] * w;
        store16(dy + r * width + i, g, m);
      }
      dweight[r] = sum(acc);
    }
  });
  return 0;
}
