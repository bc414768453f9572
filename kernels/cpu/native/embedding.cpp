// The summed dMel embedding and its gradient.
#include "vec.h"

// 0, or 1 + index of the first code outside [0, bins)
template <class C> INLINE int64_t check_codes(const C* codes, int64_t n, int64_t bins) {
  for (int64_t i = 0; i < n; i++) {
    if (uint64_t(int64_t(codes[i])) >= uint64_t(bins)) return 1 + i;
  }
  return 0;
}

// VECTORS of one output row, their chains in registers over all channels.
template <int VECTORS, class C, class T>
INLINE void gather_columns(const C* codes, int64_t channels, int64_t bins, const T* table, int64_t width, T* out) {
  vf acc[VECTORS];
  for (int v = 0; v < VECTORS; v++) acc[v] = zero();
  for (int64_t c = 0; c < channels; c++) {
    const T* row = table + (int64_t(codes[c]) + c * bins) * width;
    for (int v = 0; v < VECTORS; v++) acc[v] = acc[v] + load(row + v * W);
  }
  for (int v = 0; v < VECTORS; v++) store(out + v * W, acc[v]);
}

template <class C, class T>
INLINE int64_t embedding_sum(const C* codes, const T* table, T* out, int64_t rows, int64_t channels, int64_t bins,
                             int64_t width) {
  if (int64_t bad = check_codes(codes, rows * channels, bins)) return bad;
  parallel(rows, double(rows * channels) * double(width) * 0.04, [=](int64_t begin, int64_t end) {
    // Columns outermost: a strip of the table stays in the second-level cache while all rows pass over it.
    int64_t i = 0;
    for (; i + 8 * W <= width; i += 8 * W) {
      for (int64_t r = begin; r < end; r++) {
        gather_columns<8>(codes + r * channels, channels, bins, table + i, width, out + r * width + i);
      }
    }
    for (; i < width; i += W) {
      int m = width - i < W ? int(width - i) : W;
      for (int64_t r = begin; r < end; r++) {
        vf acc = zero();
        for (int64_t c = 0; c < channels; c++) {
          acc = acc + load(table + (int64_t(codes[r * channels + c]) + c * bins) * width + i, m);
        }
        store(out + r * width + i, acc, m);
      }
    }
  });
  return 0;
}

#define EMBEDDING(CODE, NAME)                                                                                        \
  EXPORT int64_t embedding_sum_##NAME##_f32(const CODE* codes, const float* table, float* out, int64_t rows,         \
                                            int64_t channels, int64_t bins, int64_t width) {                         \
    return embedding_sum(codes, table, out, rows, channels, bins, width);                                            \
  }                                                                                                                  \
  EXPORT int64_t embedding_sum_##NAME##_bf16(const CODE* codes, const bf16* table, bf16* out, int64_t rows,          \
                                             int64_t channels, int64_t bins, int64_t width) {                        \
    return embedding_sum(codes, table, out, rows, channels, bins, width);                                            \
  }
EMBEDDING(uint8_t, uint8)
EMBEDDING(int16_t, int16)
EMBEDDING(int32_t, int32)
EMBEDDING(int64_t, int64)

// dtable[codes[t, c] + c * bins] += dy[t], t ascending; dtable comes zeroed and codes checked.
EXPORT int64_t embedding_sum_backward(const int64_t* codes, const float* dy, float* dtable, int64_t rows,
                                      int64_t channels, int64_t bins, int64_t width) {
  parallel(channels, double(rows * channels) * double(width) * 0.1, [=](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; r++) {
      const float* grad = dy + r * width;
      for (int64_t c = begin; c < end; c++) {
        float* to = dtable + (codes[r * channels + c] + c * bins) * width;
        int64_t i = 0;
        for (; i + W <= width; i += W) store(to + i, load(to + i) + load(grad + i));
        if (int m = int(width - i)) store(to + i, load(to + i, m) + load(grad + i, m), m);
      }
    }
  });
  return 0;
}
