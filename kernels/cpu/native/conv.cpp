// The 4-tap causal depthwise convolution with its residual, over packed sequences with state.
#include "gemm.h"

constexpr int TAPS = 4, PAST = TAPS - 1;

// weight [width, 4] -> [4, width]
INLINE void transpose_taps(const float* weight, float* taps, int64_t width) {
  for (int64_t c = 0; c < width; c++) {
    for (int i = 0; i < TAPS; i++) taps[i * width + c] = weight[c * TAPS + i];
  }
}

// One row: the inputs at t - 3, …, t by pointer.
template <class T> INLINE void conv_row(const T* const* in, const float* taps, T* out, int64_t width) {
  for (int64_t c = 0; c < width; c += W) {
    int m = width - c < W ? int(width - c) : W;
    vf acc = zero(), last = zero();
    for (int i = 0; i < TAPS; i++) {
      last = load(in[i] + c, m);
      acc = fma(load(taps + i * width + c, m), last, acc);
    }
    store(out + c, last + acc, m);
  }
}

// x [T, width] with row stride ldx -> y [T, width]; state [slots, 3, width] or null, read where start > 0, overwritten.
// Returns 0, or 1 + s for the first segment that names a slot outside the state or needs one and has none.
template <class T>
INLINE int64_t short_conv(const T* x, int64_t ldx, const float* weight, const int32_t* slot, const int32_t* start,
                          const int32_t* offset, int64_t segments, T* state, int64_t slots, T* y, int64_t width) {
  for (int64_t s = 0; s < segments; s++) {
    if (state != nullptr ? uint32_t(slot[s]) >= uint32_t(slots) : start[s] > 0) return 1 + s;
  }
  Scratch scratch(TAPS * width * 4 + width * int64_t(sizeof(T)));
  float* taps = scratch.as<float>();
  T* nothing = reinterpret_cast<T*>(taps + TAPS * width);
  transpose_taps(weight, taps, width);
  memset(nothing, 0, size_t(width) * sizeof(T));
  parallel(segments, double(offset[segments] * width) * 0.25, [=](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) {
      T* held = state == nullptr ? nullptr : state + slot[s] * PAST * width;
      const T* before[PAST];  // inputs at positions start - 3 … start - 1
      for (int i = 0; i < PAST; i++) before[i] = start[s] > 0 ? held + i * width : nothing;
      const int64_t first = offset[s], length = offset[s + 1] - first;
      auto input = [=](int64_t t) { return t < 0 ? before[PAST + t] : x + (first + t) * ldx; };
      for (int64_t t = 0; t < length; t++) {
        const T* in[TAPS] = {input(t - 3), input(t - 2), input(t - 1), input(t)};
        conv_row(in, taps, y + (first + t) * width, width);
      }
      if (held == nullptr) continue;
      // Ascending order: with fewer than three new rows, kept ones move forward in the state before being overwritten.
      for (int i = 0; i < PAST; i++) {
        const T* from = input(length - PAST + i);
        if (from != held + i * width) memcpy(held + i * width, from, size_t(width) * sizeof(T));
      }
    }
  });
  return 0;
}
EXPORT int64_t short_conv_f32(const float* x, int64_t ldx, const float* weight, const int32_t* slot,
                              const int32_t* start, const int32_t* offset, int64_t segments, float* state,
                              int64_t slots, float* y, int64_t width) {
  return short_conv(x, ldx, weight, slot, start, offset, segments, state, slots, y, width);
}
EXPORT int64_t short_conv_bf16(const bf16* x, int64_t ldx, const float* weight, const int32_t* slot,
                               const int32_t* start, const int32_t* offset, int64_t segments, bf16* state,
                               int64_t slots, bf16* y, int64_t width) {
  return short_conv(x, ldx, weight, slot, start, offset, segments, state, slots, y, width);
}

// dx[t] = dy[t] + sum_i w[i] * dy[t + 3 - i], rows of the same segment; dweight[c, i] = sum_t dy[t] * x[t - 3 + i] in
// ascending t. Every segment starts at 0. dx or dweight may be null.
EXPORT int64_t short_conv_backward(const float* x, const float* weight, const int32_t* offset, int64_t segments,
                                   const float* dy, float* dx, float* dweight, int64_t width) {
  Scratch scratch(2 * TAPS * width * 4);
  float *taps = scratch.as<float>(), *dtaps = taps + TAPS * width;
  transpose_taps(weight, taps, width);
  memset(dtaps, 0, size_t(TAPS * width) * 4);
  parallel((width + LANES - 1) / LANES, double(offset[segments] * width) * 0.7, [=](int64_t begin, int64_t end) {
    const int64_t c0 = begin * LANES, c1 = end * LANES < width ? end * LANES : width;
    for (int64_t s = 0; s < segments; s++) {
      for (int64_t t = offset[s]; t < offset[s + 1]; t++) {
        const int64_t behind = t - offset[s], ahead = offset[s + 1] - 1 - t;
        for (int64_t c = c0; c < c1; c += W) {
          int m = c1 - c < W ? int(c1 - c) : W;
          vf grad = load(dy + t * width + c, m);
          if (dx != nullptr) {
            vf acc = zero();
            for (int i = 0; i < TAPS; i++) {
              if (PAST - i <= ahead) acc = fma(load(taps + i * width + c, m), load(dy + (t + PAST - i) * width + c, m), acc);
            }
            store(dx + t * width + c, grad + acc, m);
          }
          if (dweight != nullptr) {
            for (int i = 0; i < TAPS; i++) {
              if (PAST - i > behind) continue;
              float* to = dtaps + i * width + c;
              store(to, fma(grad, load(x + (t - PAST + i) * width + c, m), load(to, m)), m);
            }
          }
        }
      }
    }
  });
  if (dweight == nullptr) return 0;
  for (int64_t c = 0; c < width; c++) {
    for (int i = 0; i < TAPS; i++) dweight[c * TAPS + i] = dtaps[i * width + c];
  }
  return 0;
}
