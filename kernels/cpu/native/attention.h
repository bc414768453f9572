// What the attention kernels share: rows of scores over one split of keys, and small products for the backward.
//
// Every element is one chain of fma over an ascending index, however many rows and columns a block takes at once; so
// block shapes are chosen for speed and never enter the result.
//
// A score is one chain: first the relative bias over c (rel_i,c * proj_c,distance), then the dot product over d of
// q_i,d * k_j,d, with tau and the softmax scale already multiplied into rel and q.
#pragma once

#include <stdlib.h>

#include <vector>

#include "vec.h"

#define MEMBER inline __attribute__((always_inline))  // INLINE for member functions

constexpr int SPLIT = 64;  // keys in a split, which is a page: kernels.layout.SPLIT_TOKENS

INLINE vf reversed(vf x) {
  vi last_first;
  for (int i = 0; i < W; i++) last_first[i] = W - 1 - i;
  return __builtin_shuffle(x, last_first);
}

// rel_proj [C, extent] with its distance axis reversed, so that neighbouring keys are neighbouring floats: the bias of
// channel c for key j seen from position i is at row(c)[j - i]. Zeros surround the known distances.
class ReversedProj {
 public:
  int64_t extent = 0;  // distances kept: rel_proj's, cut to what this call can see

  template <class T> void build(const T* proj, int64_t ld, int64_t channels, int64_t kept) {
    extent = kept;
    ld_ = kept + 2 * MARGIN;
    data_.resize(size_t(channels * ld_));
    for (int64_t c = 0; c < channels; c++) {
      float* to = data_.data() + c * ld_;
      const T* from = proj + c * ld;
      memset(to, 0, MARGIN * 4);
      memset(to + MARGIN + kept, 0, MARGIN * 4);
      to += MARGIN;
      int64_t x = 0;
      for (; x + W <= kept; x += W) store(to + x, reversed(load(from + kept - x - W)));
      for (; x < kept; x++) to[x] = to_float(from[kept - 1 - x]);
    }
  }
  const float* row(int64_t c) const { return data_.data() + c * ld_ + MARGIN + extent - 1; }
  int64_t ld() const { return ld_; }

 private:
  static constexpr int64_t MARGIN = SPLIT + 16;  // a block of keys may overhang on both sides
  std::vector<float> data_;
  int64_t ld_ = 0;
};

// Keeps a loaded vector in its register: GCC would rather load it again for each row that uses it.
INLINE void keep(vf& x) { asm("" : "+v"(x)); }

// acc[m][n] += sum_k a[m * sm + k * sk] * b[k * ldb + n], ascending k
template <int MR, int NV, class B>
INLINE void chain(vf (&acc)[MR][NV], const float* a, int64_t sm, int64_t sk, const B* b, int64_t ldb, int64_t count) {
  for (int64_t k = 0; k < count; k++) {
    vf column[NV];
    for (int n = 0; n < NV; n++) column[n] = load(b + k * ldb + n * W), keep(column[n]);
    for (int m = 0; m < MR; m++) {
      vf x = splat(a[m * sm + k * sk]);
      for (int n = 0; n < NV; n++) acc[m][n] = fma(x, column[n], acc[m][n]);
    }
  }
}

// The same for the last `lanes` < W columns.
template <int MR, class B>
INLINE void chain_tail(vf (&acc)[MR][1], const float* a, int64_t sm, int64_t sk, const B* b, int64_t ldb,
                       int64_t count, int lanes) {
  for (int64_t k = 0; k < count; k++) {
    vf column = load(b + k * ldb, lanes);
    for (int m = 0; m < MR; m++) acc[m][0] = fma(splat(a[m * sm + k * sk]), column, acc[m][0]);
  }
}

// c[m * ldc + n] += sum_k a[m * sm + k * sk] * b[k * ldb + n] for MR rows and all `columns` columns
template <int MR, int NV, class B>
INLINE void accumulate(float* c, int64_t ldc, const float* a, int64_t sm, int64_t sk, const B* b, int64_t ldb,
                       int64_t count, int64_t columns) {
  int64_t n = 0;
  for (; n + NV * W <= columns; n += NV * W) {
    vf acc[MR][NV];
    for (int m = 0; m < MR; m++)
      for (int i = 0; i < NV; i++) acc[m][i] = load(c + m * ldc + n + i * W);
    chain<MR, NV>(acc, a, sm, sk, b + n, ldb, count);
    for (int m = 0; m < MR; m++)
      for (int i = 0; i < NV; i++) store(c + m * ldc + n + i * W, acc[m][i]);
  }
  for (; n < columns; n += W) {
    int lanes = columns - n < W ? int(columns - n) : W;
    vf acc[MR][1];
    for (int m = 0; m < MR; m++) acc[m][0] = load(c + m * ldc + n, lanes);
    if (lanes == W) chain<MR, 1>(acc, a, sm, sk, b + n, ldb, count);
    else chain_tail<MR>(acc, a, sm, sk, b + n, ldb, count, lanes);
    for (int m = 0; m < MR; m++) store(c + m * ldc + n, acc[m][0], lanes);
  }
}

// e^x for x <= 0 (or NaN), within 1 ulp; 0 where e^x would be denormal. Two thirds of the work of exp(): softmax weights
// need neither its range nor denormals.
INLINE vf exp_down(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  vf shifted = fma(x, splat(1.44269504088896341f), magic), n = shifted - magic;
  vf r = fma(n, splat(-0.693145751953125f), x);
  r = fma(n, splat(-1.42860682030941723e-6f), r);
  vf p = splat(1.98412698e-4f);
  p = fma(p, r, splat(1.38888889e-3f));
  p = fma(p, r, splat(8.33333333e-3f));
  p = fma(p, r, splat(4.16666667e-2f));
  p = fma(p, r, splat(1.66666667e-1f));
  p = fma(p, r, splat(0.5f));
  p = fma(p * r, r, r) + splat(1.f);
  vf scale = (vf)(((vu)shifted << 23) + 0x3f800000u);  // unsigned, since what is too small may wrap around
  return x < splat(-87.3f) ? zero() : p * scale;
}

INLINE vi lane_index() {
  vi r;
  for (int i = 0; i < W; i++) r[i] = i;
  return r;
}

// Products of POS positions x HB heads with NV * W neighbouring keys. Row (p, h) reads a + (p * heads + h) * width and
// writes out + (p * out_heads + h) * ld; keys is [width, SPLIT] from the block's first key on. With BIAS the chain
// starts with the relative bias: rel's rows lie like a's, `ahead` is the first key's position minus the first row's.
template <int POS, int HB, int NV, bool BIAS, class K>
INLINE void score_block(const float* a, int64_t width, const K* keys, int64_t heads, float* out, int64_t out_heads,
                        int64_t ld, const float* rel = nullptr, int64_t channels = 0, const ReversedProj* proj = nullptr,
                        int64_t ahead = 0) {
  constexpr int MR = POS * HB;
  vf acc[MR][NV];
  for (int m = 0; m < MR; m++)
    for (int n = 0; n < NV; n++) acc[m][n] = zero();
  if (BIAS && -ahead - (NV * W - 1) < proj->extent) {
    const float* near = proj->row(0) + ahead;
    for (int64_t c = 0; c < channels; c++, near += proj->ld()) {
      for (int p = 0; p < POS; p++) {
        vf column[NV];
        for (int n = 0; n < NV; n++) column[n] = load(near - p + n * W), keep(column[n]);
        for (int h = 0; h < HB; h++) {
          vf x = splat(rel[(p * heads + h) * channels + c]);
          for (int n = 0; n < NV; n++) acc[p * HB + h][n] = fma(x, column[n], acc[p * HB + h][n]);
        }
      }
    }
    if (POS - 1 - ahead >= proj->extent) {  // part of the block is beyond the extent: bias 0 there, even for rel = inf
      for (int p = 0; p < POS; p++)
        for (int n = 0; n < NV; n++) {
          vi distance = splat_int(int(p - ahead - n * W)) - lane_index();
          for (int h = 0; h < HB; h++)
            acc[p * HB + h][n] = distance < splat_int(int(proj->extent)) ? acc[p * HB + h][n] : zero();
        }
    }
  }
  for (int64_t d = 0; d < width; d++) {
    vf column[NV];
    for (int n = 0; n < NV; n++) column[n] = load(keys + d * SPLIT + n * W), keep(column[n]);
    for (int p = 0; p < POS; p++)
      for (int h = 0; h < HB; h++) {
        vf x = splat(a[(p * heads + h) * width + d]);
        for (int n = 0; n < NV; n++) acc[p * HB + h][n] = fma(x, column[n], acc[p * HB + h][n]);
      }
  }
  for (int p = 0; p < POS; p++)
    for (int h = 0; h < HB; h++)
      for (int n = 0; n < NV; n++) store(out + (p * out_heads + h) * ld + n * W, acc[p * HB + h][n]);
}

// Keys that a score block takes at once: about eight accumulators, which covers the fma's latency.
constexpr int score_vectors(int rows) { return rows >= 4 ? 2 : rows == 2 ? 4 : SPLIT / W; }

// Which keys a position sees: of those up to itself the ones less than `window` before it, and those at positions before
// `kept`. That is a multiple of SPLIT, so a split is kept as a whole or not at all.
struct Sight {
  int64_t window, kept;

  // The first split that a row at `position` or later sees, and the one that it sees next after `split`.
  MEMBER int64_t begin(int64_t position) const { return kept > 0 ? 0 : oldest(position); }
  MEMBER int64_t next(int64_t split, int64_t position) const {
    const int64_t after = split + 1, near = oldest(position);
    return after * SPLIT < kept || after > near ? after : near;
  }

 private:
  MEMBER int64_t oldest(int64_t position) const {
    const int64_t key = position - window + 1;
    return key > 0 ? key / SPLIT : 0;
  }
};

// Keys of the split starting at `first` that position i sees: [lo, hi), empty when lo >= hi.
struct Range {
  int64_t lo, hi;
};
INLINE Range visible(int64_t i, Sight sight, int64_t first) {
  int64_t lo = first < sight.kept ? 0 : i - sight.window + 1 - first, hi = i + 1 - first;
  return {lo < 0 ? 0 : lo, hi > SPLIT ? SPLIT : hi};
}

// Calls body(position, head, POS, HB) over all positions x heads in blocks of up to four rows.
template <int POS, int HB, class Body> INLINE void blocks_of(int64_t positions, int64_t heads, Body& body) {
  for (int64_t h = 0; h < heads; h += HB) {
    int64_t p = 0;
    for (; p + POS <= positions; p += POS) body.template run<POS, HB>(p, h);
    if (POS > 1)
      for (; p < positions; p++) body.template run<1, HB>(p, h);
  }
}
template <class Body> INLINE void for_blocks(int64_t positions, int64_t heads, Body& body) {
  if (heads % 4 == 0) blocks_of<1, 4>(positions, heads, body);
  else if (heads % 2 == 0) blocks_of<2, 2>(positions, heads, body);
  else blocks_of<4, 1>(positions, heads, body);
}

// Rows [count, width] of one key head's values (row stride ld) -> [splits, width, SPLIT], zeros past the end.
INLINE void transpose_splits(const float* x, int64_t ld, int64_t count, int64_t width, float* out) {
  for (int64_t first = 0; first < count; first += SPLIT, out += width * SPLIT) {
    int64_t keys = count - first < SPLIT ? count - first : SPLIT;
    const float* rows = x + first * ld;
    for (int64_t d = 0; d < width; d++) {
      for (int64_t j = 0; j < keys; j++) out[d * SPLIT + j] = rows[j * ld + d];
      for (int64_t j = keys; j < SPLIT; j++) out[d * SPLIT + j] = 0.f;
    }
  }
}

struct Segs {  // kernels.layout.Segments
  const int32_t *slot, *start, *offset;
  int64_t count;
  int64_t length(int64_t s) const { return offset[s + 1] - offset[s]; }
};

// Distances whose bias some row of the call can see.
INLINE int64_t distances(const Segs& segs, int64_t extent, Sight sight) {
  int64_t reach = 0;
  for (int64_t s = 0; s < segs.count; s++) {
    int64_t end = segs.start[s] + segs.length(s);
    reach = end > reach ? end : reach;
  }
  if (sight.kept == 0 && sight.window < reach) reach = sight.window;
  return reach < extent ? reach : extent;
}

// About how many (row, key) pairs the call sees, a head.
INLINE double work_pairs(const Segs& segs, Sight sight) {
  const double most = double(sight.window) + double(sight.kept);
  double pairs = 0;
  for (int64_t s = 0; s < segs.count; s++) {
    double reach = double(segs.start[s] + segs.length(s));
    pairs += double(segs.length(s)) * (reach < most ? reach : most);
  }
  return pairs;
}
