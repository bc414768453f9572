// Log-probabilities with their digest, entropy and Gumbel sampling. fp32 rows throughout.
//
// One function, log_softmax_row(), makes the row of log-probabilities for learner and sampler alike, so what `sample`
// stores is bit for bit what `logprob` recomputes. Sums run on 16 virtual lanes by token id and one fixed tree.
#include <vector>

#include "vec.h"

namespace {

const float INF = __builtin_inff();
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;

// Vigna's splitmix64: the output after state x.
INLINE uint64_t splitmix64(uint64_t x) {
  x += GOLDEN;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
INLINE uint64_t token_hash(int64_t v, float logp) { return splitmix64(uint64_t(v) << 32 | float_bits(logp)); }

// What a class of rows allows: blocks of 16 tokens with none allowed are skipped, and their share of the digest (the
// hash of -inf at each id) is the same for every row of the class.
struct Class {
  bool known = false;
  std::vector<int32_t> blocks;  // first token of each block that allows something
  uint64_t digest = 0;
};

void learn_class(Class& c, const uint8_t* allowed, int64_t vocab) {
  c.known = true, c.digest = 0;
  c.blocks.clear();
  for (int64_t v = 0; v < vocab; v += LANES) {
    const int64_t end = v + LANES < vocab ? v + LANES : vocab;
    bool some = false;
    for (int64_t n = v; n < end; n++) some |= allowed[n] != 0;
    if (some) c.blocks.push_back(int32_t(v));
    else
      for (int64_t n = v; n < end; n++) c.digest += token_hash(n, -INF);
  }
}

// 16 booleans as masks; lanes from `count` on are off.
struct Mask16 {
  vi part[PARTS];
};
INLINE Mask16 allowed_lanes(const uint8_t* allowed, int count) {
  alignas(16) uint8_t bytes[LANES] = {};
  memcpy(bytes, allowed, size_t(count));
  Mask16 mask;
#ifdef __AVX512F__
  mask.part[0] = (vi)_mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)bytes)) != splat_int(0);
#else
  for (int i = 0; i < PARTS; i++)
    mask.part[i] = (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bytes + i * W))) != splat_int(0);
#endif
  return mask;
}

struct RowSum {
  float peak;     // max of logit / temperature over the allowed tokens
  float log_sum;  // ln sum e^(logit / temperature - peak)
  float entropy;  // nats
  uint64_t digest;
};

// Why a row fails; a call returns 8 * row + reason for the lowest failing row, or 0.
enum { FINE = 0, BAD_LOGIT = 1, NO_TOKEN = 2, NOT_ALLOWED = 3, BAD_CLASS = 4, BAD_TOKEN = 5 };

// logp[v] = (logit / temperature - peak) - log_sum for the tokens of the class's blocks, -inf where not allowed there;
// other blocks of logp are left as they are. logp has room for vocab rounded up to 16.
int log_softmax_row(const float* logits, float temperature, const Class& c, const uint8_t* allowed, int64_t vocab,
                    float* logp, RowSum& row) {
  F16 top = splat16(-INF);
  vi bad = splat_int(0);
  for (int32_t v : c.blocks) {
    const int lanes = vocab - v < LANES ? int(vocab - v) : LANES;
    const Mask16 mine = allowed_lanes(allowed + v, lanes);
    F16 x = load16(logits + v, lanes);
    for (int i = 0; i < PARTS; i++) {
      bad |= mine.part[i] & ~(x.part[i] < splat(INF));  // NaN or +inf
      x.part[i] = mine.part[i] ? x.part[i] / splat(temperature) : splat(-INF);
    }
    store16(logp + v, x);
    top = max(top, x);
  }
  if (any(bad)) return BAD_LOGIT;
  row.peak = max(top);
  if (row.peak == -INF) return NO_TOKEN;
  if (row.peak == INF) return BAD_LOGIT;  // overflowed in the division by the temperature

  F16 total = splat16(0.f), weighted = splat16(0.f);
  for (int32_t v : c.blocks) {
    F16 x = load16(logp + v);
    for (int i = 0; i < PARTS; i++) {
      x.part[i] = x.part[i] - splat(row.peak);
      vf e = exp(x.part[i]);
      total.part[i] = total.part[i] + e;
      weighted.part[i] = fma(e, x.part[i] > splat(-INF) ? x.part[i] : zero(), weighted.part[i]);
    }
    store16(logp + v, x);
  }
  const float all = sum(total);
  row.log_sum = log1(all);
  row.entropy = row.log_sum - sum(weighted) / all;
  row.digest = c.digest;
  for (int32_t v : c.blocks) {
    const int lanes = vocab - v < LANES ? int(vocab - v) : LANES;
    F16 x = load16(logp + v);
    for (int i = 0; i < PARTS; i++) x.part[i] = x.part[i] - splat(row.log_sum);
    store16(logp + v, x);
    for (int n = 0; n < lanes; n++) row.digest += token_hash(v + n, logp[v + n]);
  }
  return FINE;
}

// Gumbel noise -ln E, E = -ln u, of 16 words of 64 random bits. The top bit chooses a half of (0, 1) for u, the other 63
// bits, made odd, its distance x = m / 2^64 in (0, 1/2] from that half's end: u = 1 - x where the bit is 0, else u = x.
// x is rounded once, so it is precise to 2^-24 of itself however near its end u lies: noise reaches from -3.8 to 44.4,
// its greatest values, those that draw improbable tokens, as often as they should.
//
// Near u = 1, -ln(1 - x) comes from y = 1 - x, rounded, and d = y - 1, exact: ln(y) / d hardly changes over the error of
// y, so E = x ln(y) / d (Kahan; Goldberg 1991, theorem 4), and E = x where y rounds to 1.
INLINE F16 gumbel(const uint64_t* word) {
  alignas(64) float odd[LANES];
  alignas(64) int32_t top[LANES];  // negative where the word's top bit is 1
  for (int n = 0; n < LANES; n++) {
    odd[n] = float(int64_t(word[n] << 1 >> 1 | 1));
    top[n] = int32_t(word[n] >> 32);
  }
  F16 noise;
  for (int i = 0; i < PARTS; i++) {
    vi bits;
    memcpy(&bits, top + i * W, sizeof bits);
    vi low = bits < splat_int(0);  // u is below 1/2
    vf x = load(odd + i * W) * splat(0x1p-64f), y = splat(1.f) - x, d = y - splat(1.f);
    vf ln = log(low ? x : y);
    vf high = d == zero() ? x : ln * (x / d);
    noise.part[i] = -log(low ? -ln : high);
  }
  return noise;
}

// That of 16 neighbouring tokens from v on.
INLINE F16 gumbel(uint64_t key, int64_t v) {
  alignas(64) uint64_t word[LANES];
  for (int n = 0; n < LANES; n++) word[n] = splitmix64(key + uint64_t(v + n + 1) * GOLDEN);
  return gumbel(word);
}

// The lowest token id with the greatest score, and that score, over the class's blocks.
struct Best {
  float score = -INF;
  int64_t token = -1;
};
INLINE void best_of(Best& best, F16 score, int64_t v, Mask16 allowed) {
  for (int i = 0; i < PARTS; i++) score.part[i] = allowed.part[i] ? score.part[i] : splat(-INF);
  if (best.token >= 0 && max(score) <= best.score) return;
  alignas(64) float s[LANES];
  alignas(64) int32_t on[LANES];
  store16(s, score);
  memcpy(on, allowed.part, sizeof on);
  for (int n = 0; n < LANES; n++)
    if (on[n] && (best.token < 0 || s[n] > best.score)) best.score = s[n], best.token = v + n;
}

// The classes that a call's rows use. `error` is that of the lowest row whose class is out of range.
struct Table {
  std::vector<Class> known;
  int64_t error = 0;

  Table(const uint8_t* allowed, int64_t classes, int64_t vocab, const int64_t* row_class, int64_t rows)
      : known(size_t(classes)) {
    for (int64_t r = 0; r < rows && !error; r++) {
      if (row_class[r] < 0 || row_class[r] >= classes) {
        error = 8 * r + BAD_CLASS;
        break;
      }
      Class& c = known[size_t(row_class[r])];
      if (!c.known) learn_class(c, allowed + row_class[r] * vocab, vocab);
    }
  }
};

// The error of the lowest row, of those that the threads met.
struct FirstError {
  int64_t found = INT64_MAX;
  void add(int64_t row, int what) {
    const int64_t mine = row * 8 + what;
#pragma omp critical(metronome_first_error)
    if (mine < found) found = mine;
  }
  int64_t result() const { return found == INT64_MAX ? 0 : found; }
};

thread_local std::vector<float> row_scratch;

}  // namespace

// logits [rows, vocab] with row stride ld, allowed [classes, vocab]. peak_out and log_sum_out [rows], for the backward,
// may be null (both). Returns 0 or an error, see above.
EXPORT int64_t logprob_rows(const float* logits, int64_t ld, const int64_t* token, float temperature,
                            const uint8_t* allowed, const int64_t* row_class, int64_t rows, int64_t vocab,
                            int64_t classes, float* logp_out, float* entropy_out, int64_t* digest_out,
                            float* peak_out, float* log_sum_out) {
  const Table table(allowed, classes, vocab, row_class, rows);
  if (table.error) return table.error;
  FirstError error;
  parallel(rows, double(rows * vocab) * 3.0, [&](int64_t begin, int64_t end) {
    row_scratch.resize(size_t(vocab + LANES));
    float* logp = row_scratch.data();
    for (int64_t r = begin; r < end; r++) {
      const uint8_t* mine = allowed + row_class[r] * vocab;
      RowSum row;
      int what = log_softmax_row(logits + r * ld, temperature, table.known[size_t(row_class[r])], mine, vocab, logp, row);
      if (what == FINE && (token[r] < 0 || token[r] >= vocab)) what = BAD_TOKEN;
      if (what == FINE && !mine[token[r]]) what = NOT_ALLOWED;
      if (what != FINE) {
        error.add(r, what);
        return;
      }
      logp_out[r] = logp[token[r]], entropy_out[r] = row.entropy, digest_out[r] = int64_t(row.digest);
      if (peak_out) peak_out[r] = row.peak, log_sum_out[r] = row.log_sum;
    }
  });
  return error.result();
}

// dlogits[v] = (dlogp (1[v = token] - p_v) - dentropy p_v (ln p_v + entropy)) / temperature; 0 where not allowed
EXPORT int64_t logprob_backward(const float* logits, int64_t ld, const int64_t* token, float temperature,
                                const uint8_t* allowed, const int64_t* row_class, int64_t rows, int64_t vocab,
                                const float* peak, const float* log_sum, const float* entropy, const float* dlogp,
                                const float* dentropy, float* dlogits) {
  parallel(rows, double(rows * vocab) * 1.5, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const uint8_t* mine = allowed + row_class[r] * vocab;
      const vf grad = splat(dlogp[r]), spread = splat(dentropy[r]), mean = splat(entropy[r]);
      for (int64_t v = 0; v < vocab; v += LANES) {
        const int lanes = vocab - v < LANES ? int(vocab - v) : LANES;
        const Mask16 on = allowed_lanes(mine + v, lanes);
        F16 x = load16(logits + r * ld + v, lanes);
        for (int i = 0; i < PARTS; i++) {
          vf logp = (x.part[i] / splat(temperature) - splat(peak[r])) - splat(log_sum[r]);
          vf p = exp(logp);
          vf far = logp > splat(-INF) ? logp : zero();  // p = 0 there
          vf d = -p * fma(spread, far + mean, grad) / splat(temperature);
          x.part[i] = on.part[i] ? d : zero();
        }
        store16(dlogits + r * vocab + v, x, lanes);
      }
      dlogits[r * vocab + token[r]] += dlogp[r] / temperature;
    }
  });
  return 0;
}

// As logprob_rows; temperature 0 is greedy.
EXPORT int64_t sample_rows(const float* logits, int64_t ld, float temperature, const int64_t* key,
                           const uint8_t* allowed, const int64_t* row_class, int64_t rows, int64_t vocab,
                           int64_t classes, int64_t* token_out, float* logp_out, int64_t* digest_out) {
  const Table table(allowed, classes, vocab, row_class, rows);
  if (table.error) return table.error;
  const bool greedy = temperature == 0.f;
  FirstError error;
  parallel(rows, double(rows * vocab) * 6.0, [&](int64_t begin, int64_t end) {
    row_scratch.resize(size_t(vocab + LANES));
    float* logp = row_scratch.data();
    for (int64_t r = begin; r < end; r++) {
      const uint8_t* mine = allowed + row_class[r] * vocab;
      const Class& c = table.known[size_t(row_class[r])];
      RowSum row;
      if (int what = log_softmax_row(logits + r * ld, greedy ? 1.f : temperature, c, mine, vocab, logp, row)) {
        error.add(r, what);
        return;
      }
      Best best;
      for (int32_t v : c.blocks) {
        const int lanes = vocab - v < LANES ? int(vocab - v) : LANES;
        F16 score = load16(greedy ? logits + r * ld + v : logp + v, lanes);
        if (!greedy) score = add(score, gumbel(uint64_t(key[r]), v));
        best_of(best, score, v, allowed_lanes(mine + v, lanes));
      }
      token_out[r] = best.token, logp_out[r] = logp[best.token], digest_out[r] = int64_t(row.digest);
    }
  });
  return error.result();
}

// The noise of n given words, for tests and the self-check.
EXPORT int64_t vec_gumbel(const int64_t* word, float* noise, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    const int m = n - i < LANES ? int(n - i) : LANES;
    alignas(64) uint64_t mine[LANES] = {};
    memcpy(mine, word + i, size_t(m) * sizeof *word);
    store16(noise + i, gumbel(mine), m);
  }
  return 0;
}
