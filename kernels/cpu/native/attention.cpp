// Attention forward: left-aligned splits of keys, each reduced on its own, combined left to right.
//
// A row's bits depend on its position, its q and rel, and the keys and values it sees. They do not depend on the rows
// beside it: rows are taken in tiles only so that a split is loaded once for several of them.
#include "attention.h"

namespace {

template <class T> struct Rows {  // a [T, heads, width] tensor whose rows may be strided
  const T* data;
  int64_t ld;
};

template <class T> struct Call {
  Rows<T> q, k, v, rel;
  const float* tau;  // [T] or null
  float scale;
  int64_t heads, key_heads, width, channels;
  Sight sight;
  ReversedProj proj;
  T* out;      // [T, heads, width]
  float* lse;  // [T, heads] or null
  int64_t group() const { return heads / key_heads; }
};

// The rows of one tile: `count` positions x group heads that share a key head.
struct Tile {
  int64_t row;       // first row in the packed tensors
  int64_t position;  // its absolute position
  int64_t count;     // positions
  int64_t key_head;
};

struct Scratch {
  std::vector<float> q, rel, split_out, out, split_max, split_sum, max, sum, keep, add, keys;
  void reserve(int64_t rows, int64_t width, int64_t channels) {
    q.resize(size_t(rows * width)), rel.resize(size_t(rows * channels + 1));
    split_out.resize(size_t(rows * width)), out.resize(size_t(rows * width));
    for (auto* v : {&split_max, &split_sum, &max, &sum, &keep, &add}) v->resize(size_t(rows + W));
  }
};
thread_local Scratch scratch;

template <class P> struct Page {
  const P* key;    // [width, SPLIT]
  const P* value;  // [SPLIT, width], row stride ld
  int64_t ld;
};

// e^(score - max) over one row's visible keys, zeros elsewhere in the touched blocks of 16; max and sum of the split.
INLINE void softmax_split(float* s, Range r, float& split_max, float& split_sum) {
  const int64_t first = r.lo / LANES * LANES;
  const float inf = __builtin_inff();
  F16 top = splat16(-inf);
  for (int64_t j = first; j < r.hi; j += LANES) {
    F16 x = load16(s + j);
    if (j < r.lo || j + LANES > r.hi) {
      for (int i = 0; i < PARTS; i++) {
        vi key = splat_int(int(j) + i * W) + lane_index();
        vi seen = (key >= splat_int(int(r.lo))) & (key < splat_int(int(r.hi)));
        x.part[i] = seen ? x.part[i] : splat(-inf);
      }
      store16(s + j, x);
    }
    top = max(top, x);
  }
  split_max = max(top);
  F16 total = splat16(0.f);
  vf peak = splat(split_max);
  for (int64_t j = first; j < r.hi; j += LANES) {
    F16 x = load16(s + j);
    for (int i = 0; i < PARTS; i++) x.part[i] = exp_down(x.part[i] - peak);
    store16(s + j, x);
    total = add(total, x);
  }
  split_sum = sum(total);
}

// Scores, softmax and weighted values of one split for blocks of rows of a tile.
template <class T, class P> struct SplitPass {
  const Call<T>& call;
  const Tile& tile;
  Scratch& x;
  Page<P> page;
  int64_t first;  // the split's first key position

  template <int POS, int HB> MEMBER void run(int64_t p, int64_t h) {
    constexpr int MR = POS * HB, NV = score_vectors(MR), KEYS = NV * W;
    const int64_t group = call.group(), row = p * group + h, i = tile.position + p;
    Range head = visible(i, call.sight, first), last = visible(i + POS - 1, call.sight, first);
    if (head.lo >= SPLIT || last.hi <= 0) return;  // no row of the block sees this split
    alignas(64) float s[MR * SPLIT];
    for (int64_t j = head.lo / KEYS * KEYS; j < last.hi; j += KEYS) {
      score_block<POS, HB, NV, true>(&x.q[size_t(row * call.width)], call.width, page.key + j, group, s + j,
                                     HB, SPLIT, &x.rel[size_t(row * call.channels)], call.channels, &call.proj,
                                     first + j - i);
    }
    for (int n = 0; n < POS; n++) {
      Range r = visible(i + n, call.sight, first);
      if (r.lo >= r.hi) continue;
      for (int m = 0; m < HB; m++) {
        size_t at = size_t(row + n * group + m);
        softmax_split(s + (n * HB + m) * SPLIT, r, x.split_max[at], x.split_sum[at]);
      }
    }
    // Each row adds exactly the keys it sees: those that all positions of the block see together, the ragged ends alone.
    float* out = &x.split_out[size_t(row * call.width)];
    for (int n = 0; n < POS; n++)
      for (int m = 0; m < HB; m++) memset(out + (n * group + m) * call.width, 0, size_t(call.width) * 4);
    if (POS == 1) {
      weigh<1, HB>(out, s, 0, head);
      return;
    }
    Range common = {last.lo, head.hi};
    if (common.lo >= common.hi) {
      for (int n = 0; n < POS; n++) weigh<1, HB>(out, s, n, visible(i + n, call.sight, first));
      return;
    }
    for (int n = 0; n < POS; n++) {
      Range r = visible(i + n, call.sight, first);
      weigh<1, HB>(out, s, n, {r.lo, common.lo});
    }
    weigh<POS, HB>(out, s, 0, common);
    for (int n = 0; n < POS; n++) {
      Range r = visible(i + n, call.sight, first);
      weigh<1, HB>(out, s, n, {common.hi, r.hi});
    }
  }

  template <int POS, int HB> MEMBER void weigh(float* out, const float* s, int64_t n, Range keys) {
    if (keys.lo >= keys.hi) return;
    constexpr int NV = POS * HB >= 4 ? 2 : 4;
    const float* weight = s + n * HB * SPLIT + keys.lo;
    float* to = out + n * call.group() * call.width;
    weigh_rows<POS, HB, NV>(to, weight, page.value + keys.lo * page.ld, keys.hi - keys.lo);
  }

  template <int POS, int HB, int NV> MEMBER void weigh_rows(float* out, const float* weight, const P* value, int64_t count) {
    constexpr int MR = POS * HB;
    auto row = [&](int m) { return out + (m / HB * call.group() + m % HB) * call.width; };
    int64_t d = 0;
    for (; d + NV * W <= call.width; d += NV * W) {
      vf acc[MR][NV];
      for (int m = 0; m < MR; m++)
        for (int n = 0; n < NV; n++) acc[m][n] = load(row(m) + d + n * W);
      chain<MR, NV>(acc, weight, SPLIT, 1, value + d, page.ld, count);
      for (int m = 0; m < MR; m++)
        for (int n = 0; n < NV; n++) store(row(m) + d + n * W, acc[m][n]);
    }
    for (; d < call.width; d += W) {
      int lanes = call.width - d < W ? int(call.width - d) : W;
      vf acc[MR][1];
      for (int m = 0; m < MR; m++) acc[m][0] = load(row(m) + d, lanes);
      chain_tail<MR>(acc, weight, SPLIT, 1, value + d, page.ld, count, lanes);
      for (int m = 0; m < MR; m++) store(row(m) + d, acc[m][0], lanes);
    }
  }
};

template <class T> void load_tile(const Call<T>& call, const Tile& tile, Scratch& x) {
  const int64_t group = call.group(), rows = tile.count * group;
  x.reserve(rows, call.width, call.channels);
  for (int64_t p = 0; p < tile.count; p++) {
    const int64_t t = tile.row + p;
    const float tau = call.tau ? call.tau[t] : 1.f, scale = tau * call.scale;
    const T* q = call.q.data + t * call.q.ld + tile.key_head * group * call.width;
    const T* rel = call.rel.data + t * call.rel.ld + tile.key_head * group * call.channels;
    float* to = &x.q[size_t(p * group * call.width)];
    for (int64_t n = 0; n < group * call.width; n++) to[n] = to_float(q[n]) * scale;
    to = &x.rel[size_t(p * group * call.channels)];
    for (int64_t n = 0; n < group * call.channels; n++) to[n] = to_float(rel[n]) * tau;
  }
  for (int64_t r = 0; r < rows; r++) x.max[size_t(r)] = -__builtin_inff(), x.sum[size_t(r)] = 0.f;
  memset(x.out.data(), 0, size_t(rows * call.width) * 4);
}

// out = (e^(M - M') M-part + e^(m - M') split part), M' = max(M, m), for the rows that see the split
// (Milakov & Gimelshein 2018).
template <class T> void combine(const Call<T>& call, const Tile& tile, Scratch& x, int64_t first) {
  const int64_t group = call.group(), rows = tile.count * group;
  for (int64_t r = 0; r < rows; r += W) {
    vf old = load(&x.max[size_t(r)]), now = load(&x.split_max[size_t(r)]), top = max(old, now);
    store(&x.keep[size_t(r)], exp(old - top));
    store(&x.add[size_t(r)], exp(now - top));
  }
  for (int64_t p = 0; p < tile.count; p++) {
    Range seen = visible(tile.position + p, call.sight, first);
    if (seen.lo >= seen.hi) continue;
    for (size_t r = size_t(p * group); r < size_t((p + 1) * group); r++) {
      const float keep = x.keep[r], more = x.add[r];
      x.max[r] = x.split_max[r] > x.max[r] ? x.split_max[r] : x.max[r];
      x.sum[r] = fma1(x.split_sum[r], more, x.sum[r] * keep);
      float *out = &x.out[r * size_t(call.width)], *split = &x.split_out[r * size_t(call.width)];
      int64_t d = 0;
      for (; d + W <= call.width; d += W) store(out + d, fma(load(split + d), splat(more), load(out + d) * splat(keep)));
      for (; d < call.width; d++) out[d] = fma1(split[d], more, out[d] * keep);
    }
  }
}

template <class T> void store_tile(const Call<T>& call, const Tile& tile, const Scratch& x) {
  const int64_t group = call.group();
  for (int64_t p = 0; p < tile.count; p++) {
    const int64_t at = (tile.row + p) * call.heads + tile.key_head * group;
    for (int64_t h = 0; h < group; h++) {
      const size_t r = size_t(p * group + h);
      const float over = 1.f / x.sum[r];
      const float* from = &x.out[r * size_t(call.width)];
      T* to = call.out + (at + h) * call.width;
      int64_t d = 0;
      for (; d + W <= call.width; d += W) store(to + d, load(from + d) * splat(over));
      for (; d < call.width; d++) to[d] = from_float<T>(from[d] * over);
      if (call.lse) call.lse[at + h] = x.max[r] + log1(x.sum[r]);
    }
  }
}

// Asks for the first lines of the next split while this one is computed: pages lie anywhere, so the processor cannot
// guess where one begins; it can guess how it goes on.
template <class P> INLINE void fetch_ahead(Page<P> page) {
  for (int line = 0; line < 16; line++) {
    __builtin_prefetch((const char*)page.key + line * 64);
    __builtin_prefetch((const char*)page.value + line * 64);
  }
}

// One tile over all its splits; page_of(split) -> Page<P>
template <class P, class T, class PageOf> void attend(const Call<T>& call, const Tile& tile, PageOf page_of) {
  Scratch& x = scratch;
  load_tile(call, tile, x);
  const int64_t last = (tile.position + tile.count - 1) / SPLIT;
  for (int64_t split = call.sight.begin(tile.position), next; split <= last; split = next) {
    next = call.sight.next(split, tile.position);
    if (next <= last) fetch_ahead(page_of(next));
    SplitPass<T, P> pass{call, tile, x, page_of(split), split * SPLIT};
    for_blocks(tile.count, call.group(), pass);
    combine(call, tile, x, split * SPLIT);
  }
  store_tile(call, tile, x);
}

INLINE int64_t tile_positions(int64_t group) { return group >= 8 ? 4 : 32 / group; }

// A guess in ns on one thread.
template <class T> double work_of(const Call<T>& call, const Segs& segs) {
  return work_pairs(segs, call.sight) * double(call.heads * (2 * call.width + call.channels)) * 0.03;
}

// Without cache: every segment starts at 0; keys are transposed into scratch for one segment and key head at a time.
void attend_segments(const Call<float>& call, const Segs& segs) {
  parallel(segs.count * call.key_heads, work_of(call, segs), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t s = item / call.key_heads, head = item % call.key_heads, length = segs.length(s);
      const int64_t row = segs.offset[s], splits = (length + SPLIT - 1) / SPLIT;
      scratch.keys.resize(size_t(splits * SPLIT * call.width));
      transpose_splits(call.k.data + row * call.k.ld + head * call.width, call.k.ld, length, call.width,
                       scratch.keys.data());
      const float *keys = scratch.keys.data(), *values = call.v.data + row * call.v.ld + head * call.width;
      auto page_of = [&](int64_t split) {
        return Page<float>{keys + split * call.width * SPLIT, values + split * SPLIT * call.v.ld, call.v.ld};
      };
      const int64_t step = tile_positions(call.group());
      for (int64_t p = 0; p < length; p += step)
        attend<float>(call, Tile{row + p, p, length - p < step ? length - p : step, head}, page_of);
    }
  });
}

template <class T> struct Cache {
  T *key, *value;
  const int32_t* table;
  int64_t slots, max_pages, pages;
};

// 0, or 1 + segment * 2^32 + split of the first page that a segment needs and does not have.
template <class T> int64_t missing_page(const Call<T>& call, const Segs& segs, const Cache<T>& cache) {
  for (int64_t s = 0; s < segs.count; s++) {
    const int64_t start = segs.start[s], last = (start + segs.length(s) - 1) / SPLIT;
    for (int64_t split = call.sight.begin(start); split <= last; split = call.sight.next(split, start)) {
      bool held = segs.slot[s] >= 0 && segs.slot[s] < cache.slots && split < cache.max_pages;
      if (held) {
        int32_t page = cache.table[segs.slot[s] * cache.max_pages + split];
        held = page >= 0 && page < cache.pages;
      }
      if (!held) return 1 + (s << 32) + split;
    }
  }
  return 0;
}

template <class T> void write_pages(const Call<T>& call, const Segs& segs, const Cache<T>& cache) {
  const int64_t width = call.width;
  for (int64_t s = 0; s < segs.count; s++) {
    for (int64_t n = 0; n < segs.length(s); n++) {
      const int64_t position = segs.start[s] + n, row = segs.offset[s] + n, at = position % SPLIT;
      const int64_t page = cache.table[segs.slot[s] * cache.max_pages + position / SPLIT];
      for (int64_t h = 0; h < call.key_heads; h++) {
        T* key = cache.key + (page * call.key_heads + h) * width * SPLIT + at;
        const T* from = call.k.data + row * call.k.ld + h * width;
        for (int64_t d = 0; d < width; d++) key[d * SPLIT] = from[d];
        memcpy(cache.value + ((page * call.key_heads + h) * SPLIT + at) * width,
               call.v.data + row * call.v.ld + h * width, size_t(width) * sizeof(T));
      }
    }
  }
}

template <class T> int64_t attend_cache(const Call<T>& call, const Segs& segs, const Cache<T>& cache) {
  if (int64_t missing = missing_page(call, segs, cache)) return missing;
  write_pages(call, segs, cache);
  struct Item {
    int64_t segment;
    Tile tile;
  };
  static thread_local std::vector<Item> items;
  items.clear();
  const int64_t step = tile_positions(call.group());
  for (int64_t s = 0; s < segs.count; s++)
    for (int64_t h = 0; h < call.key_heads; h++)
      for (int64_t p = 0, length = segs.length(s); p < length; p += step)
        items.push_back({s, Tile{segs.offset[s] + p, segs.start[s] + p, length - p < step ? length - p : step, h}});
  const Item* all = items.data();
  parallel(int64_t(items.size()), work_of(call, segs), [&, all](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const Tile& tile = all[n].tile;
      const int32_t* pages = cache.table + segs.slot[all[n].segment] * cache.max_pages;
      auto page_of = [&](int64_t split) {
        const int64_t at = (pages[split] * call.key_heads + tile.key_head) * call.width * SPLIT;
        return Page<T>{cache.key + at, cache.value + at, call.width};
      };
      attend<T>(call, tile, page_of);
    }
  });
  return 0;
}

}  // namespace

// q [T, heads, width], k and v [T, key_heads, width], rel [T, heads, channels], rows strided by ld*;
// proj [channels, extent] fp32, row stride extent; window is a large number where there is none, kept as in
// `Sight`. Returns 0, or 1 + the first segment that does not start at position 0.
EXPORT int64_t attention_f32(const float* q, int64_t ldq, const float* k, int64_t ldk, const float* v, int64_t ldv,
                             const float* rel, int64_t ldrel, const float* proj, const float* tau,
                             const int32_t* slot, const int32_t* start, const int32_t* offset, int64_t segments,
                             int64_t heads, int64_t key_heads, int64_t width, int64_t channels, int64_t extent,
                             int64_t window, int64_t kept, float scale, float* out, float* lse) {
  static thread_local Call<float> call;
  call.q = {q, ldq}, call.k = {k, ldk}, call.v = {v, ldv}, call.rel = {rel, ldrel};
  call.tau = tau, call.scale = scale, call.heads = heads, call.key_heads = key_heads;
  call.width = width, call.channels = channels, call.sight = {window, kept}, call.out = out, call.lse = lse;
  Segs segs{slot, start, offset, segments};
  for (int64_t s = 0; s < segments; s++)
    if (start[s] != 0) return 1 + s;
  call.proj.build(proj, extent, channels, distances(segs, extent, call.sight));
  attend_segments(call, segs);
  return 0;
}

// With cache: writes k and v into the pages, then attends over the pages. Returns 0, or 1 + segment * 2^32 + split
// (nothing is written then) where a page is missing.
#define ATTENTION_CACHE(NAME, T)                                                                                      \
  EXPORT int64_t NAME(const T* q, int64_t ldq, const T* k, int64_t ldk, const T* v, int64_t ldv, const T* rel,        \
                      int64_t ldrel, const float* proj, const float* tau, const int32_t* slot, const int32_t* start,  \
                      const int32_t* offset, int64_t segments, int64_t heads, int64_t key_heads, int64_t width,       \
                      int64_t channels, int64_t extent, int64_t window, int64_t kept, float scale, T* out, T* key,    \
                      T* value, const int32_t* table, int64_t slots, int64_t max_pages, int64_t pages) {              \
    static thread_local Call<T> call;                                                                                 \
    call.q = {q, ldq}, call.k = {k, ldk}, call.v = {v, ldv}, call.rel = {rel, ldrel};                                 \
    call.tau = tau, call.scale = scale, call.heads = heads, call.key_heads = key_heads;                               \
    call.width = width, call.channels = channels, call.sight = {window, kept}, call.out = out, call.lse = nullptr;    \
    Segs segs{slot, start, offset, segments};                                                                         \
    call.proj.build(proj, extent, channels, distances(segs, extent, call.sight));                                     \
    return attend_cache(call, segs, Cache<T>{key, value, table, slots, max_pages, pages});                            \
  }
ATTENTION_CACHE(attention_cache_f32, float)
ATTENTION_CACHE(attention_cache_bf16, bf16)
