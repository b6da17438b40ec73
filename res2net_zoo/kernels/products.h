// Sums of products of pixels and weights, for cpu_network.cpp: in float32 for float32 and bfloat16, in int32 for
// 8-bit integers (unsigned pixels, signed weights).
//
// A tile of pixels by output channels stays in registers while the kernel iterates over taps and input channels. Each
// lane sums the products of one output channel: of one input channel in float32, of two in bfloat16, and of four in
// 8 bits. Sums of integers are exact, so all instruction sets return the same result.

#pragma once

#include "vectors.h"

namespace {

#ifndef AHEAD
#define AHEAD 40  // prefetch distance of weights in steps; hardware prefetchers stop at page boundaries
#endif

#ifdef WIDE
// With 32 registers of 16 floats, 28 sums, 2 vectors of weights and 1 of input are the largest tile, which has
// the fewest loads per multiplication.
constexpr int ROWS = 14;
#else
constexpr int ROWS = 6;
#endif

// How many input channels a lane processes at a time, and the type of its sums.
template <class T> struct Lane;
template <> struct Lane<float> { static constexpr int CHANNELS = 1; using Sum = Vec; };
template <> struct Lane<bf16> { static constexpr int CHANNELS = 2; using Sum = Vec; };
template <> struct Lane<u8> { static constexpr int CHANNELS = 4; using Sum = Ints; };

template <class T, int M, int N> using Sums = typename Lane<T>::Sum[M][N];

inline Vec multiply_add(Vec sum, const float* x, Vec weight) { return fma(splat(*x), weight, sum); }

#ifdef __AVX512BF16__
inline Vec multiply_add(Vec sum, const bf16* x, Vec weight) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)_mm512_set1_epi32(pair));
}
#else
inline Vec multiply_add(Vec sum, const bf16*, Vec) { return sum; }  // has_bf16 returns 0
#endif

inline Ints multiply_add(Ints sum, const u8* x, Ints weight) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    Ints value = splat_int(four);
#if defined(WIDE) && defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sum, value, weight);
#elif defined(WIDE)
    // The sum of two products of bytes overflows 16 bits (vpmaddubsw saturates), so bytes are widened first.
    Ints even = _mm512_madd_epi16(_mm512_and_si512(value, _mm512_set1_epi16(255)),
                                  _mm512_srai_epi16(_mm512_slli_epi16(weight, 8), 8));
    Ints odd = _mm512_madd_epi16(_mm512_srli_epi16(value, 8), _mm512_srai_epi16(weight, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)value, (__m256i)weight);
#elif defined(__AVX2__)
    __m256i x4 = (__m256i)value, w4 = (__m256i)weight;
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(x4, _mm256_set1_epi16(255)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(w4, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x4, 8), _mm256_srai_epi16(w4, 8));
    return sum + (Ints)_mm256_add_epi32(even, odd);
#else
    return sum + (value & 255) * (weight << 24 >> 24) + (value >> 8 & 255) * (weight << 16 >> 24) +
           (value >> 16 & 255) * (weight << 8 >> 24) + (value >> 24 & 255) * (weight >> 24);
#endif
}

// Add the products of M pixels and N vectors of output channels. `x` has the pixels' first elements, to which the
// offsets of taps are added; `w` has the weights by tap and input channel.
template <class T, int M, int N>
inline void multiply(Sums<T, M, N>& sum, const T* const* x, const T* w, const int32_t* tap, int64_t taps,
                     int64_t channels) {
    constexpr int STEP = Lane<T>::CHANNELS, SIZE = STEP * LANES;
    for (int64_t t = 0; t < taps; t++) {
        int64_t k = tap[t], end = k + channels;
        for (; k < end; k += STEP, w += SIZE * N) {
            typename Lane<T>::Sum weight[N];
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) {
                memcpy(&weight[n], w + SIZE * n, sizeof weight[n]);
                __builtin_prefetch(w + SIZE * (AHEAD * N + n));
            }
#pragma GCC unroll 16
            for (int m = 0; m < M; m++)
#pragma GCC unroll 2
                for (int n = 0; n < N; n++) sum[m][n] = multiply_add(sum[m][n], x[m] + k, weight[n]);
        }
    }
}

// Intel's tile registers (AMX): 16 rows of 64 bytes, and products of two of them into a third one of 16 x 16 sums.
// Here two registers of pixels and two of weights give four products, so that each load is used twice.
constexpr int TILE = 16;          // pixels, and output channels, of a register
constexpr int TILE_BYTES = 64;    // of a pixel's input channels
constexpr int TILED_PIXELS = 32;  // pixels of two registers

#if defined(WIDE) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define TILES 1
#endif

// The sums of a tile: [pixel][output channel].
template <class T> struct alignas(64) TileSums {
    typename Lane<T>::Sum of[TILED_PIXELS][2];
};

#ifdef TILES
}  // namespace

#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Request permission to use the tile registers from the operating system, once per process. Return whether it is
// granted.
inline bool permit_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

// Set the registers' shapes for a number of pixels: 0 to 3 sums, 4 and 5 pixels, 6 and 7 weights.
inline void configure_tiles(int64_t pixels) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } shape;
    int64_t upper = pixels > TILE ? (pixels + 1) / 2 : pixels, lower = pixels > TILE ? pixels / 2 : 1;
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = TILE_BYTES;
        shape.rows[i] = i == 6 || i == 7 ? TILE : i == 2 || i == 3 || i == 5 ? lower : upper;
    }
    _tile_loadconfig(&shape);
}

#define PRODUCT(sum, x, w) \
    if constexpr (sizeof(T) == 1) _tile_dpbusd(sum, x, w); else _tile_dpbf16ps(sum, x, w)

// Products of PAIR registers of pixels, `upper` rows in the first, and N of output channels. Pixels are `pitch` bytes
// apart, and have a multiple of 64 bytes. Other work can be done in `between`, which is called after each part.
template <class T, int PAIR, int N, class F>
inline void multiply_tiles(TileSums<T>& sums, int64_t upper, const char* x, int64_t pitch, const char* w,
                           int64_t bytes, F between) {
    const char* x2 = x + upper * pitch;
    _tile_zero(0);
    if (N > 1) _tile_zero(1);
    if (PAIR > 1) _tile_zero(2);
    if (PAIR > 1 && N > 1) _tile_zero(3);
    for (int64_t k = 0; k < bytes; k += TILE_BYTES, w += TILE * TILE_BYTES * N) {
        _tile_loadd(6, w, TILE_BYTES * N);
        _tile_loadd(4, x + k, pitch);
        PRODUCT(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, w + TILE_BYTES, TILE_BYTES * N);
            PRODUCT(1, 4, 7);
        }
        if (PAIR > 1) {
            _tile_loadd(5, x2 + k, pitch);
            PRODUCT(2, 5, 6);
            if (N > 1) {
                PRODUCT(3, 5, 7);
            }
        }
        between();
    }
    _tile_stored(0, &sums.of[0][0], sizeof sums.of[0]);
    if (N > 1) _tile_stored(1, &sums.of[0][1], sizeof sums.of[0]);
    if (PAIR > 1) _tile_stored(2, &sums.of[upper][0], sizeof sums.of[0]);
    if (PAIR > 1 && N > 1) _tile_stored(3, &sums.of[upper][1], sizeof sums.of[0]);
}

#undef PRODUCT
#endif

}  // namespace
