// Replays recorded calls (record.py) of the native library on another build of it, another instruction set or another
// machine, and compares all memory: `replay LIBRARY RECORD`. Needs no Python and no torch.
//
// Each buffer ends where a page ends that nothing may touch, so a read or write past its end is a crash; a masked load
// or store that reaches past it is not, and may not be one.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <omp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <termios.h>
#include <ucontext.h>
#include <unistd.h>

typedef int64_t i64;
typedef uint64_t u64;

enum { INTEGER, FLOAT, ADDRESS };
enum { MOST_INTEGERS = 48, MOST_FLOATS = 8, MOST_BUFFERS = 48, PAGE = 4096 };

// On x86-64 integers and floats go to the callee separately, each in its own order, and it ignores what it does not
// ask for: so one type with many of both calls any function of up to that many arguments.
#define TWELVE(X, n) X(n + 0), X(n + 1), X(n + 2), X(n + 3), X(n + 4), X(n + 5), X(n + 6), X(n + 7), X(n + 8), X(n + 9), X(n + 10), X(n + 11)
#define I64(n) i64
#define PASS(n) integers[n]
typedef i64 Function(I64(0), I64(1), I64(2), I64(3), I64(4), I64(5), I64(6), I64(7), I64(8), I64(9), I64(10), I64(11),
                     TWELVE(I64, 12), TWELVE(I64, 24), TWELVE(I64, 36), float, float, float, float, float, float, float,
                     float);

// Equal, or NaN both, of any sign and payload: which of two NaN operands an instruction passes on depends on the order in
// which the compiler names them. Memory has no type here, so each four bytes are taken as a float and as two bf16.
static int nan_float(uint32_t x) { return (x & 0x7fffffff) > 0x7f800000; }
static int nan_bf16(uint32_t x) { return (x & 0x7fff) > 0x7f80; }
static int same_bf16(uint32_t x, uint32_t y) { return x == y || (nan_bf16(x) && nan_bf16(y)); }
static u64 first_difference(const unsigned char *a, const unsigned char *b, u64 size) {
  u64 i = 0;
  for (; i < size; i += 4) {
    uint32_t x = 0, y = 0, some = size - i < 4 ? (uint32_t)(size - i) : 4;
    memcpy(&x, a + i, some);
    memcpy(&y, b + i, some);
    if (x == y || (nan_float(x) && nan_float(y))) continue;
    if (!same_bf16(x & 0xffff, y & 0xffff) || !same_bf16(x >> 16, y >> 16)) return i;
  }
  return size;
}

static const char *running = "nothing";

static int said(int status) {  // status, when all that was printed has left the machine's port
  fflush(stdout);
  tcdrain(STDOUT_FILENO);
  return status;
}

static void crashed(int signal, siginfo_t *info, void *context) {
  const unsigned char *at = (const unsigned char *)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
  printf("crashed in %s: signal %d at %p, instruction", running, signal, info->si_addr);
  for (int i = 0; i < 12; i++) printf(" %02x", at[i]);
  printf("\n");
  _exit(said(3));
}

int main(int count, char **arguments) {
  if (count != 3) return fprintf(stderr, "usage: %s LIBRARY RECORD\n", arguments[0]), 2;
  struct sigaction report = {.sa_sigaction = crashed, .sa_flags = SA_SIGINFO};
  const int signals[] = {SIGSEGV, SIGILL, SIGBUS, SIGFPE};
  for (int i = 0; i < 4; i++) sigaction(signals[i], &report, 0);
  omp_set_num_threads(1);  // also what links libgomp, which the library takes its OpenMP symbols from
  void *library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
  FILE *file = fopen(arguments[2], "rb");
  if (!file) return perror(arguments[2]), 2;
  fseek(file, 0, SEEK_END);
  u64 size = (u64)ftell(file);
  rewind(file);
  unsigned char *record = malloc(size);
  if (!record || fread(record, 1, size, file) != size) return fprintf(stderr, "cannot read %s\n", arguments[2]), 2;

  i64 calls = 0, differ = 0;
  const u64 *p = (const u64 *)record, *end = (const u64 *)(record + p[0]);
  for (p++; p < end; calls++) {
    running = (const char *)p;
    p += 8;
    const i64 expected = (i64)*p++;
    const u64 buffers = *p++;
    unsigned char *buffer[MOST_BUFFERS];
    const unsigned char *after[MOST_BUFFERS];
    u64 bytes[MOST_BUFFERS], room[MOST_BUFFERS];
    if (buffers > MOST_BUFFERS) return fprintf(stderr, "%s: too many buffers\n", running), 2;
    for (u64 b = 0; b < buffers; b++) {
      bytes[b] = *p++;
      const unsigned char *before = record + *p++;
      after[b] = record + *p++;
      room[b] = (bytes[b] + PAGE - 1) / PAGE * PAGE;
      unsigned char *pages = mmap(0, room[b] + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (pages == MAP_FAILED || mprotect(pages + room[b], PAGE, PROT_NONE)) return perror("mmap"), 2;
      buffer[b] = pages + room[b] - bytes[b];
      memcpy(buffer[b], before, bytes[b]);
    }
    i64 integers[MOST_INTEGERS] = {0};
    float floats[MOST_FLOATS] = {0};
    int n = 0, m = 0;
    for (u64 left = *p++; left > 0; left--) {
      const u64 kind = *p++, value = *p++, offset = *p++;
      if (n == MOST_INTEGERS || m == MOST_FLOATS) return fprintf(stderr, "%s: too many arguments\n", running), 2;
      if (kind == FLOAT) memcpy(&floats[m++], &value, 4);
      else integers[n++] = kind == ADDRESS ? (i64)(buffer[value] + offset) : (i64)value;
    }
    Function *function = (Function *)dlsym(library, running);
    if (!function) return fprintf(stderr, "%s\n", dlerror()), 2;
    const i64 got = function(TWELVE(PASS, 0), TWELVE(PASS, 12), TWELVE(PASS, 24), TWELVE(PASS, 36), floats[0],
                             floats[1], floats[2], floats[3], floats[4], floats[5], floats[6], floats[7]);
    int wrong = got != expected;
    if (wrong) printf("call %ld, %s: returned %ld, not %ld\n", (long)calls, running, (long)got, (long)expected);
    for (u64 b = 0; b < buffers; b++) {
      const u64 i = first_difference(buffer[b], after[b], bytes[b]);
      if (i < bytes[b]) {
        printf("call %ld, %s: buffer %lu differs at byte %lu of %lu\n", (long)calls, running, b, i, bytes[b]);
        wrong = 1;
      }
      munmap(buffer[b] + bytes[b] - room[b], room[b] + PAGE);
    }
    differ += wrong;
  }
  printf("%ld calls replayed, %ld differ\n", (long)calls, (long)differ);
  return said(differ > 0);
}
