// Mistakes for the sanitizers to find; only their build has them (.ci/sanitize proves that it would see ours).
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t overrun_write(float* p, int64_t n) {
  p[n] = 1.f;
  return 0;
}
EXPORT int64_t overflow_add(int64_t a) { return a + INT64_MAX; }
