// Included before a source of kernels/cpu/native that is compiled for AVX2: it then takes its AVX-512 branches, each
// AVX-512 intrinsic being SIMDe's portable function of that name.
#pragma once

#include <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// SIMDe 0.8.2 has these two not: the low half of each lane, and bytes widened to lanes.
typedef int32_t lanes32 __attribute__((vector_size(64)));
static inline __m256i low_halves(__m512i v) {
  typedef int16_t lanes16 __attribute__((vector_size(32)));
  return (__m256i)__builtin_convertvector((lanes32)v, lanes16);
}
static inline __m512i widened_bytes(__m128i v) {
  typedef uint8_t lanes8 __attribute__((vector_size(16)));
  return (__m512i)__builtin_convertvector((lanes8)v, lanes32);
}
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 low_halves
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 widened_bytes

// SIMDe's masked loads and stores touch the memory of every lane: these, as the instructions, only those in the mask.
typedef float floats __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
static inline __m512 masked_load(__mmask16 mask, const void* p) {
  floats v = {};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) v[i] = ((const float*)p)[i];
  return (__m512)v;
}
static inline void masked_store(void* p, __mmask16 mask, __m512 v) {
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) ((float*)p)[i] = ((floats)v)[i];
}
static inline __m256i masked_load_halves(__mmask16 mask, const void* p) {
  halves v = {};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) v[i] = ((const uint16_t*)p)[i];
  return (__m256i)v;
}
static inline void masked_store_halves(void* p, __mmask16 mask, __m256i v) {
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) ((uint16_t*)p)[i] = ((halves)v)[i];
}
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps masked_load
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps masked_store
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 masked_load_halves
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 masked_store_halves

// Empty ones, which hold a vector in a register: here a vector of 64 bytes is in two.
#define asm(...)

// Last: with it, <immintrin.h> and SIMDe would use the instructions themselves.
#define __AVX512F__ 1
