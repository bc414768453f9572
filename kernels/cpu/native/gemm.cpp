// linear and expert_linear, packing, and the weights' gradient. See gemm.h for why bits cannot depend on the shape.
#include "gemm.h"

// ---- packing ----

// w [n, k] -> columns first … first + n of panels
template <class T> INLINE void pack_rows(const T* w, int64_t n, int64_t k_size, T* panels, int64_t first) {
  for (int64_t r = 0; r < n; r++) {
    const int64_t column = first + r;
    T* panel = panels + column / PANEL * panel_size<T>(k_size);
    for (int64_t k = 0; k < k_size; k++) panel[panel_at(panel, k, column % PANEL)] = w[r * k_size + k];
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
    for (int64_t r = 0; r < n; r++)
      to[r * PANEL] = to_float(panels[r / PANEL * panel_size<T>(k_size) + panel_at(panels, k, r % PANEL)]);
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

// ---- a block of rows ----

// From so many rows on k is walked in stretches, and bf16 panels are widened once per block instead of in every tile.
constexpr int MANY_ROWS = 24;
constexpr int64_t ROW_FLOATS = DEPTH + 16;  // of a row's stretch: rows must not fall into the same cache sets

template <class T> INLINE void widen(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, int(n - i)), int(n - i));
}

// A stretch of a bf16 panel as fp32, [depth][16].
INLINE void widen_panel(const bf16* from, float* to, int64_t depth) {
  for (int64_t k = 0; k < depth; k += 2)
    for (int i = 0; i < PARTS; i++) {
      const vi pairs = load_pairs(from + k * PANEL + i * W * 2);
      store(to + k * PANEL + i * W, lower(pairs));
      if (k + 1 < depth) store(to + (k + 1) * PANEL + i * W, upper(pairs));
    }
}

// Bytes of scratch that `typed_block` needs for up to `rows` rows and `count` panels.
template <class T, class C> INLINE int64_t scratch_bytes(int rows, int64_t k_size, int64_t count) {
  if (rows < MANY_ROWS) return sizeof(T) == 4 ? 0 : 4 * rows * k_size;
  int64_t floats = rows * ROW_FLOATS;
  if (sizeof(T) == 2) floats += DEPTH * PANEL * GROUP;
  if (sizeof(C) == 2 && k_size > DEPTH) floats += rows * count * PANEL;
  return 4 * floats;
}

// One block: rows x[i] times panels [p0, p1), to c. `buffer` as scratch_bytes() says.
template <class T, class C>
INLINE void few_rows(int rows, int64_t k_size, const T* const* x, float* buffer, const T* panels, C* const* c,
                     int64_t p0, int64_t p1, int64_t columns) {
  if constexpr (sizeof(T) == 4) {
    block<false, true>(rows, k_size, x, panels, panel_size<T>(k_size), c, p0, p1, columns, [](int, int, int) {});
  } else {
    const float* wide[MANY_ROWS];
    for (int i = 0; i < rows; i++) {
      widen(x[i], buffer + i * k_size, k_size);
      wide[i] = buffer + i * k_size;
    }
    block<false, true>(rows, k_size, wide, panels, panel_size<T>(k_size), c, p0, p1, columns, [](int, int, int) {});
  }
}

// Panels [p0, p1) over one stretch of k; panels points at the stretch's first k. While the tiles of one panel group run,
// the next group's stretch and the next tile's sums are asked for: both lie far apart, so the processor cannot guess.
template <bool RESUME, class T, class C>
INLINE void stretch(int rows, int64_t depth, const float* const* a, const T* panels, int64_t size, float* buffer,
                    C* const* c, int64_t p0, int64_t p1, int64_t columns) {
  constexpr int64_t LINE = 64;
  const int64_t lines = depth * PANEL * int64_t(sizeof(T)) / LINE;
  for (int64_t p = p0; p < p1; p += GROUP) {
    const int64_t count = p + GROUP < p1 ? GROUP : p1 - p, next_count = p + GROUP < p1 ? GROUP : 0;
    const T* group = panels + p * size;
    const char* next_group = (const char*)(panels + (p + next_count) * size);
    C* shifted[BLOCK_ROWS];
    for (int i = 0; i < rows; i++) shifted[i] = c[i] + p * PANEL;
    auto ahead = [&](int tile, int tiles, int next) __attribute__((always_inline)) {
      for (int i = next; i < next + MR_MAX && i < rows; i++) __builtin_prefetch(shifted[i], 1);
      for (int64_t n = 0; n < next_count && p + GROUP + n < p1; n++)
        for (int64_t line = lines * tile / tiles; line < lines * (tile + 1) / tiles; line++)
          __builtin_prefetch(next_group + n * size * int64_t(sizeof(T)) + line * LINE, 0, 2);
    };
    if constexpr (sizeof(T) == 4) {
      block<RESUME, false>(rows, depth, a, group, size, shifted, 0, count, columns - p * PANEL, ahead);
    } else {
      for (int64_t n = 0; n < count; n++) widen_panel(group + n * size, buffer + n * depth * PANEL, depth);
      block<RESUME, false>(rows, depth, a, buffer, depth * PANEL, shifted, 0, count, columns - p * PANEL, ahead);
    }
  }
}

template <class T, class C>
INLINE void many_rows(int rows, int64_t k_size, const T* const* x, float* buffer, const T* panels, C* const* c,
                      int64_t p0, int64_t p1, int64_t columns) {
  float* panel_buffer = buffer + rows * ROW_FLOATS;
  const int64_t first = p0 * PANEL, end = p1 * PANEL < columns ? p1 * PANEL : columns;
  const bool resting = sizeof(C) == 2 && k_size > DEPTH;  // chains rest in a buffer, since c cannot hold fp32
  float* rest[BLOCK_ROWS];
  for (int i = 0; i < rows; i++) {
    if (resting) rest[i] = panel_buffer + (sizeof(T) == 2 ? DEPTH * PANEL * GROUP : 0) + i * (end - first) - first;
    else rest[i] = (float*)c[i];
  }
  const float* a[BLOCK_ROWS];
  for (int64_t k = 0; k == 0 || k < k_size; k += DEPTH) {
    const int64_t depth = k_size - k < DEPTH ? k_size - k : DEPTH;
    for (int i = 0; i < rows; i++) {
      a[i] = buffer + i * ROW_FLOATS;
      if constexpr (sizeof(T) == 4) {
        if (k_size <= DEPTH) {  // short rows need no copy
          a[i] = x[i];
          continue;
        }
      }
      widen(x[i] + k, buffer + i * ROW_FLOATS, depth);
    }
    const T* from = panels + k * PANEL;
    if (k > 0) stretch<true>(rows, depth, a, from, panel_size<T>(k_size), panel_buffer, rest, p0, p1, columns);
    else if (resting) stretch<false>(rows, depth, a, from, panel_size<T>(k_size), panel_buffer, rest, p0, p1, columns);
    else stretch<false>(rows, depth, a, from, panel_size<T>(k_size), panel_buffer, c, p0, p1, columns);
  }
  if (resting)
    for (int i = 0; i < rows; i++)
      for (int64_t j = first; j < end; j += W) {
        const int m = end - j < W ? int(end - j) : W;
        store(c[i] + j, load(rest[i] + j, m), m);
      }
}

template <class T, class C>
INLINE void typed_block(int rows, int64_t k_size, const T* const* x, float* buffer, const T* panels, C* const* c,
                        int64_t p0, int64_t p1, int64_t columns) {
  if (rows < MANY_ROWS) few_rows(rows, k_size, x, buffer, panels, c, p0, p1, columns);
  else many_rows(rows, k_size, x, buffer, panels, c, p0, p1, columns);
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
  auto run = [=](int64_t r0, int64_t r1, int64_t p0, int64_t p1) {
    // Blocks of nearly one size: a short one at the end would run like a few rows.
    const int64_t blocks = (r1 - r0 + BLOCK_ROWS - 1) / BLOCK_ROWS, most = blocks ? (r1 - r0 + blocks - 1) / blocks : 0;
    Scratch scratch(scratch_bytes<T, C>(int(most), k_size, p1 - p0));
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t begin = r0 + (r1 - r0) * block / blocks, end = r0 + (r1 - r0) * (block + 1) / blocks;
      const int m = int(end - begin);
      const T* a[BLOCK_ROWS];
      C* c[BLOCK_ROWS];
      for (int i = 0; i < m; i++) a[i] = x + (begin + i) * ldx, c[i] = y + (begin + i) * ldy;
      typed_block(m, k_size, a, scratch.as<float>(), panels, c, p0, p1, n);
    }
  };
  // By columns, so that the threads read the weights once between them; narrow products go by rows.
  if (count < 4 * omp_get_max_threads() && rows >= 2 * MR_MAX * omp_get_max_threads()) {
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
  const int64_t count = panels_of(n), size = count * panel_size<T>(k_size);
  const double work = product_ns(double(rows), double(k_size), double(n), sizeof(T));
  parallel(rows * count, work, [=](int64_t begin, int64_t end) {
    Scratch scratch(scratch_bytes<T, T>(1, k_size, 0));
    for (int64_t r = begin / count; r * count < end; r++) {
      const int64_t p0 = begin > r * count ? begin - r * count : 0, p1 = end < (r + 1) * count ? end - r * count : count;
      const T* a = x + r / fan_out * ldx;
      T* c = y + r * n;
      few_rows<T, T>(1, k_size, &a, scratch.as<float>(), panels + expert[r] * size, &c, p0, p1, n);
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
  const int64_t count = panels_of(n), size = count * panel_size<T>(k_size);
  const double work = product_ns(double(rows), double(k_size), double(n), sizeof(T));
  // Positions [begin, end) of `order`, panels [p0, p1).
  auto run = [=](int64_t begin, int64_t end, int64_t p0, int64_t p1) {
    const int most = rows < BLOCK_ROWS ? int(rows) : BLOCK_ROWS;
    const int64_t many = scratch_bytes<T, T>(most, k_size, p1 - p0), few = scratch_bytes<T, T>(MANY_ROWS - 1, k_size, 0);
    Scratch scratch(many > few ? many : few);
    for (int64_t e = 0; e < experts; e++) {
      int64_t e0 = first[e] > begin ? first[e] : begin, e1 = first[e + 1] < end ? first[e + 1] : end;
      for (int64_t at = e0; at < e1; at += BLOCK_ROWS) {
        const int m = e1 - at < BLOCK_ROWS ? int(e1 - at) : BLOCK_ROWS;
        const T* a[BLOCK_ROWS];
        T* c[BLOCK_ROWS];
        for (int i = 0; i < m; i++) {
          int64_t r = order[at + i];
          a[i] = x + r / fan_out * ldx, c[i] = y + r * n;
        }
        typed_block(m, k_size, a, scratch.as<float>(), panels + e * size, c, p0, p1, n);
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
constexpr int64_t GATHER_ROWS = 4;  // measured by kernels.tools.bench: with more, reading an expert twice costs more than sorting
template <class T>
INLINE int64_t expert_linear(const T* x, int64_t ldx, int64_t fan_out, const int32_t* expert, int64_t rows,
                             const T* panels, int64_t experts, int64_t n, int64_t k_size, T* y, int64_t path) {
  if (path == GATHER || (path == AUTO && rows <= GATHER_ROWS))
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
      if (start == 0) any_row_tile<MR_MAX, false, false>(m, length, a, x_panels, length * PANEL, c, 0, count, k_size);
      else any_row_tile<MR_MAX, true, false>(m, length, a, x_panels, length * PANEL, c, 0, count, k_size);
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
