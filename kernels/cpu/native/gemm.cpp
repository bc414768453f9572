// linear and expert_linear, packing, and the weights' gradient. See gemm.h for why bits cannot depend on the shape.
#include "gemm.h"

// ---- packing ----

// w [n, k] -> columns first … first + n of panels [ceil(N / 16)][k][16]
template <class T> INLINE void pack_rows(const T* w, int64_t n, int64_t k_size, T* panels, int64_t first) {
  for (int64_t r = 0; r < n; r++) {
    int64_t column = first + r;
    T* to = panels + column / PANEL * k_size * PANEL + column % PANEL;
    for (int64_t k = 0; k < k_size; k++) to[k * PANEL] = w[r * k_size + k];
  }
}
EXPORT int64_t pack_rows_f32(const float* w, int64_t n, int64_t k_size, float* panels, int64_t first) {
  pack_rows(w, n, k_size, panels, first);
  return 0;
}
EXPORT int64_t pack_rows_bf16(const bf16* w, int64_t n, int64_t k_size, bf16* panels, int64_t first) {
  pack_rows(w, n, k_size, panels, first);
  return 0;
}

// Panels of w [n, k] -> fp32 panels of its transpose [ceil(k / 16)][n][16], for the gradient of x.
template <class T> INLINE void pack_transposed(const T* panels, int64_t n, int64_t k_size, float* out) {
  for (int64_t k = 0; k < k_size; k++) {
    float* to = out + k / PANEL * n * PANEL + k % PANEL;
    for (int64_t r = 0; r < n; r++) to[r * PANEL] = to_float(panels[(r / PANEL * k_size + k) * PANEL + r % PANEL]);
  }
}
EXPORT int64_t pack_transposed_f32(const float* panels, int64_t n, int64_t k_size, float* out) {
  pack_transposed(panels, n, k_size, out);
  return 0;
}
EXPORT int64_t pack_transposed_bf16(const bf16* panels, int64_t n, int64_t k_size, float* out) {
  pack_transposed(panels, n, k_size, out);
  return 0;
}

// ---- rows of x as fp32 ----

// From this many rows on, bf16 panels are widened once per block instead of in every tile.
constexpr int WIDEN_ROWS = 24;

template <class T> INLINE void widen(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, int(n - i)), int(n - i));
}

// One block: rows x_row(i) times panels, to c. Buffers: `xs` room for the rows as fp32 (bf16 only).
template <class T, class C>
INLINE void typed_block(int rows, int64_t k_size, const T* const* x, float* xs, const T* panels, float* panel_buffer,
                        C* const* c, int64_t p0, int64_t p1, int64_t columns) {
  if constexpr (sizeof(T) == 4) {
    block(rows, k_size, x, panels, c, p0, p1, columns);
  } else {
    const float* wide[BLOCK_ROWS];
    for (int i = 0; i < rows; i++) {
      widen(x[i], xs + i * k_size, k_size);
      wide[i] = xs + i * k_size;
    }
    if (rows < WIDEN_ROWS) {
      block(rows, k_size, wide, panels, c, p0, p1, columns);
      return;
    }
    const int64_t group = NP_BY_ROWS[MR_MAX], size = k_size * PANEL;
    for (int64_t p = p0; p < p1; p += group) {
      int64_t count = p + group < p1 ? group : p1 - p;
      widen(panels + p * size, panel_buffer, count * size);
      C* shifted[BLOCK_ROWS];
      for (int i = 0; i < rows; i++) shifted[i] = c[i] + p * PANEL;
      block(rows, k_size, wide, panel_buffer, shifted, 0, count, columns - p * PANEL);
    }
  }
}

template <class T> INLINE int64_t scratch_bytes(int rows, int64_t k_size) {
  if (sizeof(T) == 4) return 0;
  return 4 * k_size * (rows + (rows < WIDEN_ROWS ? 0 : PANEL * NP_BY_ROWS[MR_MAX]));
}

// ns on one thread: about 32 multiply-adds and 10 bytes of weights a nanosecond.
INLINE double product_ns(double rows, double k_size, double columns, double weight_bytes) {
  double compute = rows * k_size * columns / 32, memory = weight_bytes * k_size * columns / 10;
  return compute > memory ? compute : memory;
}

// ---- linear ----

template <class T, class C>
INLINE void linear(const T* x, int64_t ldx, int64_t rows, const T* panels, int64_t n, int64_t k_size, C* y,
                   int64_t ldy) {
  const int64_t count = panels_of(n);
  const double work = product_ns(double(rows), double(k_size), double(n), sizeof(T));
  const int step = block_rows(k_size);
  auto run = [=](int64_t r0, int64_t r1, int64_t p0, int64_t p1) {
    const int most = r1 - r0 < step ? int(r1 - r0) : step;
    Scratch scratch(scratch_bytes<T>(most, k_size));
    float* xs = scratch.as<float>();
    for (int64_t r = r0; r < r1; r += step) {
      const int m = r1 - r < step ? int(r1 - r) : step;
      const T* a[BLOCK_ROWS];
      C* c[BLOCK_ROWS];
      for (int i = 0; i < m; i++) a[i] = x + (r + i) * ldx, c[i] = y + (r + i) * ldy;
      typed_block(m, k_size, a, xs, panels, xs + most * k_size, c, p0, p1, n);
    }
  };
  if (rows >= 2 * MR_MAX * omp_get_max_threads()) {
    parallel(rows, work, [=](int64_t begin, int64_t end) { run(begin, end, 0, count); });
  } else {
    parallel(count, work, [=](int64_t begin, int64_t end) { run(0, rows, begin, end); });
  }
}

EXPORT int64_t linear_f32_f32(const float* x, int64_t ldx, int64_t rows, const float* panels, int64_t n, int64_t k_size,
                              float* y, int64_t ldy) {
  linear(x, ldx, rows, panels, n, k_size, y, ldy);
  return 0;
}
EXPORT int64_t linear_f32_bf16(const float* x, int64_t ldx, int64_t rows, const float* panels, int64_t n,
                               int64_t k_size, bf16* y, int64_t ldy) {
  linear(x, ldx, rows, panels, n, k_size, y, ldy);
  return 0;
}
EXPORT int64_t linear_bf16_bf16(const bf16* x, int64_t ldx, int64_t rows, const bf16* panels, int64_t n,
                                int64_t k_size, bf16* y, int64_t ldy) {
  linear(x, ldx, rows, panels, n, k_size, y, ldy);
  return 0;
}
EXPORT int64_t linear_bf16_f32(const bf16* x, int64_t ldx, int64_t rows, const bf16* panels, int64_t n, int64_t k_size,
                               float* y, int64_t ldy) {
  linear(x, ldx, rows, panels, n, k_size, y, ldy);
  return 0;
}

// ---- experts ----

// Rows ordered by expert, ascending inside one. first[e] … first[e + 1] of `order` belong to expert e.
// Returns 0, or 1 + r for the first row r whose expert is outside [0, experts).
INLINE int64_t sort_by_expert(const int32_t* expert, int64_t rows, int64_t experts, int32_t* first, int32_t* order) {
  memset(first, 0, size_t(experts + 1) * 4);
  for (int64_t r = 0; r < rows; r++) {
    if (uint32_t(expert[r]) >= uint32_t(experts)) return 1 + r;
    first[expert[r] + 1]++;
  }
  for (int64_t e = 0; e < experts; e++) first[e + 1] += first[e];
  for (int64_t r = 0; r < rows; r++) order[first[expert[r]]++] = int32_t(r);
  for (int64_t e = experts; e > 0; e--) first[e] = first[e - 1];
  first[0] = 0;
  return 0;
}

// Gather + GEMV: every row alone against its expert's panels, in the order given.
template <class T>
INLINE int64_t gather_gemv(const T* x, int64_t ldx, int64_t fan_out, const int32_t* expert, int64_t rows,
                           const T* panels, int64_t experts, int64_t n, int64_t k_size, T* y) {
  for (int64_t r = 0; r < rows; r++)
    if (uint32_t(expert[r]) >= uint32_t(experts)) return 1 + r;
  const int64_t count = panels_of(n), size = count * k_size * PANEL;
  const double work = product_ns(double(rows), double(k_size), double(n), sizeof(T));
  parallel(rows * count, work, [=](int64_t begin, int64_t end) {
    Scratch scratch(scratch_bytes<T>(1, k_size));
    for (int64_t r = begin / count; r * count < end; r++) {
      const int64_t p0 = begin > r * count ? begin - r * count : 0, p1 = end < (r + 1) * count ? end - r * count : count;
      const T* a = x + r / fan_out * ldx;
      T* c = y + r * n;
      typed_block<T, T>(1, k_size, &a, scratch.as<float>(), panels + expert[r] * size, nullptr, &c, p0, p1, n);
    }
  });
  return 0;
}

// Grouped GEMM: rows sorted by expert; each expert's panels pass once over all its rows.
template <class T>
INLINE int64_t grouped_gemm(const T* x, int64_t ldx, int64_t fan_out, const int32_t* expert, int64_t rows,
                            const T* panels, int64_t experts, int64_t n, int64_t k_size, T* y) {
  Scratch ints(4 * (experts + 1 + rows));
  int32_t *first = ints.as<int32_t>(), *order = first + experts + 1;
  if (int64_t bad = sort_by_expert(expert, rows, experts, first, order)) return bad;
  const int64_t count = panels_of(n), size = count * k_size * PANEL;
  const double work = product_ns(double(rows), double(k_size), double(n), sizeof(T));
  const int step = block_rows(k_size);
  // Positions [begin, end) of `order`, panels [p0, p1).
  auto run = [=](int64_t begin, int64_t end, int64_t p0, int64_t p1) {
    Scratch scratch(scratch_bytes<T>(step, k_size));
    float* xs = scratch.as<float>();
    for (int64_t e = 0; e < experts; e++) {
      int64_t e0 = first[e] > begin ? first[e] : begin, e1 = first[e + 1] < end ? first[e + 1] : end;
      for (int64_t at = e0; at < e1; at += step) {
        const int m = e1 - at < step ? int(e1 - at) : step;
        const T* a[BLOCK_ROWS];
        T* c[BLOCK_ROWS];
        for (int i = 0; i < m; i++) {
          int64_t r = order[at + i];
          a[i] = x + r / fan_out * ldx, c[i] = y + r * n;
        }
        typed_block(m, k_size, a, xs, panels + e * size, xs + step * k_size, c, p0, p1, n);
      }
    }
  };
  if (rows >= 8 * MR_MAX * omp_get_max_threads()) {
    parallel(rows, work, [=](int64_t begin, int64_t end) { run(begin, end, 0, count); });
  } else {
    parallel(count, work, [=](int64_t begin, int64_t end) { run(0, rows, begin, end); });
  }
  return 0;
}
// path: GATHER, GROUPED, or AUTO, which takes the one expected to be faster. Tiles follow the path, bits do not: gemm.h.
enum { AUTO = 0, GATHER = 1, GROUPED = 2 };
template <class T>
INLINE int64_t expert_linear(const T* x, int64_t ldx, int64_t fan_out, const int32_t* expert, int64_t rows,
                             const T* panels, int64_t experts, int64_t n, int64_t k_size, T* y, int64_t path) {
  if (path == GATHER || (path == AUTO && rows < experts))
    return gather_gemv(x, ldx, fan_out, expert, rows, panels, experts, n, k_size, y);
  return grouped_gemm(x, ldx, fan_out, expert, rows, panels, experts, n, k_size, y);
}
EXPORT int64_t expert_linear_f32(const float* x, int64_t ldx, int64_t fan_out, const int32_t* expert, int64_t rows,
                                 const float* panels, int64_t experts, int64_t n, int64_t k_size, float* y,
                                 int64_t path) {
  return expert_linear(x, ldx, fan_out, expert, rows, panels, experts, n, k_size, y, path);
}
EXPORT int64_t expert_linear_bf16(const bf16* x, int64_t ldx, int64_t fan_out, const int32_t* expert, int64_t rows,
                                  const bf16* panels, int64_t experts, int64_t n, int64_t k_size, bf16* y,
                                  int64_t path) {
  return expert_linear(x, ldx, fan_out, expert, rows, panels, experts, n, k_size, y, path);
}

// ---- gradient of the weights ----

// Rows reduced at a stretch; between stretches a chain rests in fp32 in dw, so the length cannot change a bit.
constexpr int64_t STRETCH = 256;

// dw[j, k] = sum_i dy[i, j] * x[i, k] in ascending i, for j in [j0, j1); row i is dy_row(i), x_row(i).
// dw holds all n rows; buffers: dy_tile [STRETCH * 6], x_panels [panels_of(k) * STRETCH * 16].
template <class DyRow, class XRow>
INLINE void weight_gradient(int64_t rows, int64_t j0, int64_t j1, int64_t k_size, float* dw, DyRow dy_row, XRow x_row) {
  const int64_t count = panels_of(k_size);
  Scratch scratch(4 * (STRETCH * MR_MAX + count * STRETCH * PANEL));
  float *dy_tile = scratch.as<float>(), *x_panels = dy_tile + STRETCH * MR_MAX;
  for (int64_t start = 0; start < rows; start += STRETCH) {
    const int64_t length = rows - start < STRETCH ? rows - start : STRETCH;
    for (int64_t i = 0; i < length; i++) {
      const float* row = x_row(start + i);
      for (int64_t k = 0; k < k_size; k += PANEL) {
        int m = k_size - k < PANEL ? int(k_size - k) : PANEL;
        store16(x_panels + (k * length + i * PANEL), load16(row + k, m));
      }
    }
    for (int64_t j = j0; j < j1; j += MR_MAX) {
      const int m = j1 - j < MR_MAX ? int(j1 - j) : MR_MAX;
      const float* a[MR_MAX];
      float* c[MR_MAX];
      for (int i = 0; i < m; i++) a[i] = dy_tile + i, c[i] = dw + (j + i) * k_size;
      for (int64_t i = 0; i < length; i++) memcpy(dy_tile + i * MR_MAX, dy_row(start + i) + j, size_t(m) * 4);
      if (start == 0) any_row_tile<MR_MAX, false>(m, length, a, x_panels, c, 0, count, k_size);
      else any_row_tile<MR_MAX, true>(m, length, a, x_panels, c, 0, count, k_size);
    }
  }
}

// dy [rows, n], x [rows, k] -> dw [n, k]
EXPORT int64_t linear_weight_gradient(const float* dy, int64_t ldy, const float* x, int64_t ldx, int64_t rows,
                                      int64_t n, int64_t k_size, float* dw) {
  if (rows == 0) {
    memset(dw, 0, size_t(n * k_size) * 4);
    return 0;
  }
  parallel((n + MR_MAX - 1) / MR_MAX, product_ns(double(rows), double(k_size), double(n), 4),
           [=](int64_t begin, int64_t end) {
             weight_gradient(rows, begin * MR_MAX, end * MR_MAX < n ? end * MR_MAX : n, k_size, dw,
                             [=](int64_t i) { return dy + i * ldy; }, [=](int64_t i) { return x + i * ldx; });
           });
  return 0;
}

// dy [rows, n], x [rows / fan_out, k] -> dw [experts, n, k]
EXPORT int64_t expert_weight_gradient(const float* dy, const float* x, int64_t ldx, int64_t fan_out,
                                      const int32_t* expert, int64_t rows, int64_t experts, int64_t n, int64_t k_size,
                                      float* dw) {
  Scratch ints(4 * (experts + 1 + rows));
  int32_t *first = ints.as<int32_t>(), *order = first + experts + 1;
  if (int64_t bad = sort_by_expert(expert, rows, experts, first, order)) return bad;
  parallel(experts, product_ns(double(rows), double(k_size), double(n), 4), [=](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; e++) {
      const int32_t* mine = order + first[e];
      const int64_t count = first[e + 1] - first[e];
      float* out = dw + e * n * k_size;
      if (count == 0) memset(out, 0, size_t(n * k_size) * 4);
      weight_gradient(count, 0, n, k_size, out, [=](int64_t i) { return dy + mine[i] * n; },
                      [=](int64_t i) { return x + mine[i] / fan_out * ldx; });
    }
  });
  return 0;
}
