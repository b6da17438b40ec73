// Vectors of floats, and their loads and stores as float32 or bfloat16, for cpu_network.cpp and fused_norm.cpp.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE 1
#endif

namespace {

using bf16 = uint16_t;

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t u = uint32_t(x) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, bf16& to) {
    uint32_t u;
    memcpy(&u, &x, 4);
    to = x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;  // round half to even
}

#ifdef WIDE
constexpr int LANES = 16;
using Vec = __m512;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
using Lanes = __mmask16;
constexpr Lanes ALL = 0xffff;
inline Lanes first(int64_t n) { return static_cast<Lanes>(n >= LANES ? ALL : (1u << n) - 1); }
inline Vec load(const float* p, Lanes some) { return _mm512_maskz_loadu_ps(some, p); }
inline void store(float* p, Vec v, Lanes some) { _mm512_mask_storeu_ps(p, some, v); }
inline Vec load(const bf16* p, Lanes some) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16));
}
inline void store(bf16* p, Vec v, Lanes some) {
#ifdef __AVX512BF16__
    _mm256_mask_storeu_epi16(p, some, (__m256i)_mm512_cvtneps_pbh(v));
#else
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));  // round half to even
    u = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    _mm256_mask_storeu_epi16(p, some, _mm512_cvtepi32_epi16(u));
#endif
}
// The same if memory continues after `some`: without a mask, with which some processors (Zen 5) do not prefetch.
inline Vec load_over(const float* p, Lanes some) { return _mm512_maskz_mov_ps(some, _mm512_loadu_ps(p)); }
inline Vec load_over(const bf16* p, Lanes some) {
    __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(some, all), 16));
}
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(b, a); }  // this order propagates a NaN in `a`
inline Vec where_positive(Vec x, Vec v) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ), v); }
#else
// Portable: eight floats, in registers of the compiler's choice.
constexpr int LANES = 8;
typedef float Vec __attribute__((vector_size(32), aligned(4)));
inline Vec zero() { return Vec{}; }
inline Vec splat(float x) { return x - Vec{}; }
using Lanes = int;
constexpr Lanes ALL = LANES;
inline Lanes first(int64_t n) { return n < LANES ? n : LANES; }
template <class T> inline Vec load(const T* p, Lanes some) {
    Vec v{};
    if (some == LANES && sizeof(T) == 4) memcpy(&v, p, sizeof v);
    else for (int i = 0; i < some; i++) v[i] = widen(p[i]);
    return v;
}
template <class T> inline void store(T* p, Vec v, Lanes some) {
    if (some == LANES && sizeof(T) == 4) memcpy(p, &v, sizeof v);
    else for (int i = 0; i < some; i++) narrow(v[i], p[i]);
}
template <class T> inline Vec load_over(const T* p, Lanes some) { return load(p, some); }
inline Vec max(Vec a, Vec b) { return a < b ? b : a; }
inline Vec where_positive(Vec x, Vec v) { return x > zero() ? v : zero(); }
#endif

}  // namespace
