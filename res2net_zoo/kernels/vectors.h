// Vectors of floats, and their loads and stores as float32, bfloat16 or 8-bit integers, for cpu_network.cpp and
// fused_norm.cpp.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define WIDE 1
#endif

#define ALWAYS_INLINE __attribute__((always_inline)) inline  // passing vectors through memory is slow

namespace {

using bf16 = uint16_t;
using u8 = uint8_t;

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
inline __mmask32 first_bytes(int64_t n) { return n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1; }
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
// 8-bit integers are stored from positive floats, rounded to nearest, half to even; larger ones saturate.
inline Vec load(const u8* p, Lanes some) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, p)));
}
inline void store(u8* p, Vec v, Lanes some) {
    _mm_mask_storeu_epi8(p, some, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(v)));
}
// Pack two vectors into 32 of them: of each 8, the first 4 are from `a` and the last 4 from `b`.
inline __m256i pack(Vec a, Vec b) {
    return _mm512_cvtusepi16_epi8(_mm512_packus_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b)));
}
inline void unpack(__m256i bytes, Vec& a, Vec& b) {
    __m512i words = _mm512_cvtepu8_epi16(bytes), none = _mm512_setzero_si512();
    a = _mm512_cvtepi32_ps(_mm512_unpacklo_epi16(words, none));
    b = _mm512_cvtepi32_ps(_mm512_unpackhi_epi16(words, none));
}
// Load without a mask if memory continues after `some`, because some processors (Zen 5) do not prefetch masked loads.
inline Vec load_over(const float* p, Lanes some) { return _mm512_maskz_mov_ps(some, _mm512_loadu_ps(p)); }
inline Vec load_over(const bf16* p, Lanes some) {
    __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(some, all), 16));
}
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(b, a); }  // this order propagates a NaN in `a`
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec where_positive(Vec x, Vec v) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ), v); }
using Ints = __m512i;  // int32
inline Ints no_sum() { return _mm512_setzero_si512(); }
inline Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Vec as_float(Ints x) { return _mm512_cvtepi32_ps(x); }
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
inline Vec load(const u8* p, Lanes some) {
    Vec v{};
    for (int i = 0; i < some; i++) v[i] = p[i];
    return v;
}
inline void store(u8* p, Vec v, Lanes some) {
    const Vec shift = Vec{} + 12582912.0f;  // 1.5 * 2^23, where floats have no fraction: rounds half to even
    const Vec top = Vec{} + 255;
    v = (top < v ? top : v) + shift - shift;
    for (int i = 0; i < some; i++) p[i] = static_cast<u8>(v[i]);
}
template <class T> inline Vec load_over(const T* p, Lanes some) { return load(p, some); }
inline Vec max(Vec a, Vec b) { return a < b ? b : a; }
inline Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < LANES; i++) a[i] = std::fma(a[i], b[i], c[i]);
    return a;
}
inline Vec where_positive(Vec x, Vec v) { return x > zero() ? v : zero(); }
typedef int32_t Ints __attribute__((vector_size(32), aligned(4)));
inline Ints no_sum() { return Ints{}; }
inline Ints splat_int(int32_t x) { return x - Ints{}; }
inline Vec as_float(Ints x) { return __builtin_convertvector(x, Vec); }
#endif

}  // namespace
