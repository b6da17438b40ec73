// The native steps of res2net_zoo/kernels/cpu_network.py: convolutional networks on CPUs, one call per inference.
//
// A network is a list of steps over buffers of activations in NHWC layout, in float32 or bfloat16; sums are
// always float32. Buffers of padded convolutions have a border of zeros, so that taps need no bounds check.
// All threads execute the list together. Each starts with its part of a step and then steals work from the
// others' parts. They synchronize only if a step reads the output of earlier ones, and then wait for the work,
// not for each other: if a thread is scheduled late, the others have done its part.
//
// A convolution is a matrix product of pixels and output channels without the usual copy of the input
// (Dukhan, "The Indirect Convolution Algorithm", arXiv 1907.02129): a tile of ROWS pixels by two vectors of
// channels stays in registers while the kernel iterates over taps and input channels.

#include <atomic>
#include <omp.h>
#include <thread>
#include <vector>

#include "vectors.h"

namespace {

#ifdef WIDE
// With 32 registers of 16 floats, 28 sums, 2 vectors of weights and 1 of input are the largest tile, which has
// the fewest loads per multiplication.
constexpr int ROWS = 14;
#else
constexpr int ROWS = 6;
#endif

enum Kind { CONV, POINTWISE, MAX_POOL, AVG_POOL, MEAN, RESIZE, INPUT };
enum Act { NONE, RELU, SIGMOID };

// The output channels of one tile: their input channels, and their weights by tap and input channel, with
// LANES * vectors for each (in bfloat16 those of two channels are interleaved).
struct Tile {
    const void* weight;
    const float* bias;
    int64_t first_in, channels_in, first_out, channels_out;
};

// A step's view of a buffer: element 0 of pixel (0, 0), and the offsets of the other pixels.
struct View {
    void* data;
    const int32_t* pixels;  // offset of each output pixel of the step (for a source: that of its first tap)
    int64_t image, row, pixel;  // the same as strides, for steps that iterate over windows
};

struct Step {
    int64_t kind, act, wait;
    int64_t pixels, channels;  // of the output
    View src, gate, add, dst, also;  // `also` += the output in `dst`
    int64_t dst_is_float;
    int64_t block, tiles, taps;
    const Tile* tile;
    const int32_t* tap;
    int64_t images, in_h, in_w, out_h, out_w;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, count_pad;
};

template <class T> inline T* at(const View& v, int64_t m) { return static_cast<T*>(v.data) + v.pixels[m]; }

template <class T> inline T* at(const View& v, int64_t n, int64_t h, int64_t w) {
    return static_cast<T*>(v.data) + n * v.image + h * v.row + w * v.pixel;
}

inline Vec activate(Vec v, int64_t act) {
    if (act == RELU) return max(v, zero());
    if (act == SIGMOID) {
        float x[LANES];
        memcpy(x, &v, sizeof x);
        for (float& y : x) y = 1 / (1 + std::exp(-y));
        memcpy(&v, x, sizeof x);
    }
    return v;
}

#ifndef AHEAD
#define AHEAD 40  // prefetch distance of weights in channels; hardware prefetchers stop at page boundaries
#endif

template <int M, int N> using Sums = Vec[M][N];

template <int M, int N>
inline void multiply(Sums<M, N>& sum, const float* const* x, const float* w, const Step& s, int64_t channels) {
    for (int64_t t = 0; t < s.taps; t++) {
        int64_t k = s.tap[t], end = k + channels;
        for (; k < end; k++, w += LANES * N) {
            Vec weight[N];
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) {
                memcpy(&weight[n], w + LANES * n, sizeof(Vec));
                __builtin_prefetch(w + LANES * (AHEAD * N + n));
            }
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) {
                Vec value = splat(x[m][k]);
#pragma GCC unroll 2
                for (int n = 0; n < N; n++) sum[m][n] += value * weight[n];
            }
        }
    }
}

template <int M, int N>
inline void multiply(Sums<M, N>& sum, const bf16* const* x, const bf16* w, const Step& s, int64_t channels) {
#ifdef __AVX512BF16__
    for (int64_t t = 0; t < s.taps; t++) {
        int64_t k = s.tap[t], end = k + channels;
        for (; k < end; k += 2, w += 2 * LANES * N) {
            __m512bh weight[N];
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) {
                memcpy(&weight[n], w + 2 * LANES * n, sizeof(Vec));
                __builtin_prefetch(w + 2 * LANES * (AHEAD * N + n));
            }
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) {
                int32_t pair;
                memcpy(&pair, x[m] + k, sizeof pair);
                __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
                for (int n = 0; n < N; n++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], weight[n], value);
            }
        }
    }
#endif
}

template <class T, int M, int N> __attribute__((noinline)) void tile(const Step& s, const Tile& t, int64_t m0) {
    const T* x[M];
    for (int m = 0; m < M; m++) x[m] = at<T>(s.src, m0 + m) + t.first_in;
    for (int m = 0; m < M; m++)  // prefetch for the epilogue
        for (int n = 0; n < N * LANES; n += 64 / sizeof(T)) {
            if (s.add.data) __builtin_prefetch(at<T>(s.add, m0 + m) + t.first_out + n);
            __builtin_prefetch(at<T>(s.dst, m0 + m) + t.first_out + n, 1);
        }
    Sums<M, N> sum;
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) memcpy(&sum[m][n], t.bias + LANES * n, sizeof(Vec));
    multiply<M, N>(sum, x, static_cast<const T*>(t.weight), s, t.channels_in);
    Vec floor = splat(s.act == RELU ? 0 : -INFINITY);
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
        int64_t c = t.first_out + LANES * n;
        Lanes some = first(t.channels_out - LANES * n);
        if (s.add.data)
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) sum[m][n] += load(at<T>(s.add, m0 + m) + c, some);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) sum[m][n] = max(sum[m][n], floor);
        if (s.dst_is_float)
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) store(at<float>(s.dst, m0 + m) + c, sum[m][n], some);
        else
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) store(at<T>(s.dst, m0 + m) + c, sum[m][n], some);
        if (s.also.data)
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) {
                T* also = at<T>(s.also, m0 + m) + c;
                store(also, sum[m][n] + load(also, some), some);
            }
    }
}

// Pointers to tile<T, M, N> for each M from 1 to ROWS.
template <class T, int N, int M = ROWS> inline void tile_of(int64_t rows, const Step& s, const Tile& t, int64_t m0) {
    if (rows == M) tile<T, M, N>(s, t, m0);
    else if constexpr (M > 1) tile_of<T, N, M - 1>(rows, s, t, m0);
}

// The first tile of a convolution that begins at or after a share of the work, counted in vectors. Tiles are
// ordered by blocks of pixel groups; the last tile of a block can be half as wide as the others.
inline int64_t tile_at(const Step& s, int64_t groups, int64_t work) {
    int64_t wide = s.tile[0].channels_out > LANES ? 2 : 1, last = s.tile[s.tiles - 1].channels_out > LANES ? 2 : 1;
    int64_t vectors = wide * (s.tiles - 1) + last;
    int64_t first = work / (s.block * vectors) * s.block, inside = work - first * vectors;
    int64_t size = groups - first < s.block ? groups - first : s.block;
    if (size <= 0) return groups * s.tiles;
    int64_t n = inside / (wide * size) < s.tiles - 1 ? inside / (wide * size) : s.tiles - 1;
    int64_t vector = n < s.tiles - 1 ? wide : last;
    return first * s.tiles + n * size + (inside - n * wide * size + vector - 1) / vector;
}

inline int64_t groups_of(const Step& s) { return (s.pixels + ROWS - 1) / ROWS; }

// Compute tiles `u` to `end` of a convolution. Pixels are split evenly into groups of at most a tile, and all weights
// are applied to one block of groups at a time.
template <class T> void conv(const Step& s, int64_t u, int64_t end) {
    int64_t groups = groups_of(s);
    for (; u < end; u++) {
        int64_t first = u / (s.block * s.tiles) * s.block;
        int64_t size = groups - first < s.block ? groups - first : s.block;
        int64_t inside = u - first * s.tiles, group = first + inside % size;
        const Tile& t = s.tile[inside / size];
        int64_t m = s.pixels * group / groups, rows = s.pixels * (group + 1) / groups - m;
        if (t.channels_out > LANES) tile_of<T, 2>(rows, s, t, m);
        else tile_of<T, 1>(rows, s, t, m);
    }
}

template <class T> void pointwise(const Step& s, int64_t m, int64_t end) {
    for (; m < end; m++)
        for (int64_t c = 0; c < s.channels; c += LANES) {
            Lanes some = first(s.channels - c);
            Vec v = load(at<T>(s.src, m) + c, some);
            if (s.gate.data) v *= load(at<T>(s.gate, m) + c, some);
            if (s.add.data) v += load(at<T>(s.add, m) + c, some);
            v = activate(v, s.act);
            if (s.dst_is_float) store(at<float>(s.dst, m) + c, v, some);
            else store(at<T>(s.dst, m) + c, v, some);
        }
}

template <class T> void pool(const Step& s, int64_t u, int64_t end) {
    auto lower = [](int64_t a, int64_t b) { return a < b ? a : b; };
    for (; u < end; u++)
        for (int64_t ow = 0; ow < s.out_w; ow++) {
            int64_t n = u / s.out_h, oh = u % s.out_h;
            int64_t h0 = oh * s.stride_h - s.pad_h, w0 = ow * s.stride_w - s.pad_w;
            // torch divides by the size of the window inside the padded image, or inside the image only.
            int64_t h1 = lower(h0 + s.kernel_h, s.in_h + s.pad_h), w1 = lower(w0 + s.kernel_w, s.in_w + s.pad_w);
            int64_t padded = (h1 - h0) * (w1 - w0);
            h0 = h0 < 0 ? 0 : h0, w0 = w0 < 0 ? 0 : w0;
            h1 = lower(h1, s.in_h), w1 = lower(w1, s.in_w);
            float scale = 1.0f / (s.count_pad ? padded : (h1 - h0) * (w1 - w0));
            for (int64_t c = 0; c < s.channels; c += LANES) {
                Lanes some = first(s.channels - c);
                Vec v = s.kind == MAX_POOL ? splat(-INFINITY) : zero();
                for (int64_t h = h0; h < h1; h++)
                    for (int64_t w = w0; w < w1; w++) {
                        Vec x = load(at<T>(s.src, n, h, w) + c, some);
                        v = s.kind == MAX_POOL ? max(x, v) : v + x;
                    }
                if (s.kind == AVG_POOL) v *= splat(scale);
                store(at<T>(s.dst, n, oh, ow) + c, v, some);
            }
        }
}

template <class T> void mean(const Step& s, int64_t u, int64_t end) {
    int64_t blocks = (s.channels + LANES - 1) / LANES;
    for (; u < end; u++) {
        int64_t n = u / blocks, c = u % blocks * LANES;
        Lanes some = first(s.channels - c);
        Vec v = zero();
        for (int64_t h = 0; h < s.in_h; h++)
            for (int64_t w = 0; w < s.in_w; w++) v += load(at<T>(s.src, n, h, w) + c, some);
        v *= splat(1.0f / (s.in_h * s.in_w));
        if (s.dst_is_float) store(at<float>(s.dst, n, 0, 0) + c, v, some);
        else store(at<T>(s.dst, n, 0, 0) + c, v, some);
    }
}

// Bilinear, as F.interpolate(align_corners=False) to a given size.
template <class T> void resize(const Step& s, int64_t u, int64_t end) {
    auto source = [](int64_t i, int64_t in, int64_t out, int64_t& a, int64_t& b) {
        float x = (i + 0.5f) * (static_cast<float>(in) / out) - 0.5f;
        if (x < 0) x = 0;
        a = static_cast<int64_t>(x);
        b = a < in - 1 ? a + 1 : a;
        return x - a;
    };
    for (; u < end; u++) {
        int64_t n = u / s.out_h, oh = u % s.out_h, top, bottom, left, right;
        float y = source(oh, s.in_h, s.out_h, top, bottom);
        for (int64_t ow = 0; ow < s.out_w; ow++) {
            float x = source(ow, s.in_w, s.out_w, left, right);
            for (int64_t c = 0; c < s.channels; c += LANES) {
                Lanes some = first(s.channels - c);
                auto row = [&](int64_t h) {
                    return splat(1 - x) * load(at<T>(s.src, n, h, left) + c, some) +
                           splat(x) * load(at<T>(s.src, n, h, right) + c, some);
                };
                store(at<T>(s.dst, n, oh, ow) + c, splat(1 - y) * row(top) + splat(y) * row(bottom), some);
            }
        }
    }
}

// Copy the images, float32 with any strides (that of channels in `gate.image`), into the first buffer.
template <class T> void input(const Step& s, int64_t u, int64_t end) {
    for (; u < end; u++) {
        int64_t n = u / s.in_h, h = u % s.in_h;
        const float* from = at<float>(s.src, n, h, 0);
        T* to = at<T>(s.dst, n, h, 0);
        // In most images the pixels of a channel are contiguous, so they are converted together.
        for (int64_t c = 0; c < s.channels; c++)
            for (int64_t w = 0; w < s.in_w; w += LANES) {
                const float* pixels = from + c * s.gate.image + w * s.src.pixel;
                T converted[LANES];
                int64_t count = s.in_w - w < LANES ? s.in_w - w : LANES;
                if (s.src.pixel == 1) store(converted, load(pixels, first(count)), first(count));
                else for (int64_t i = 0; i < count; i++) narrow(pixels[i * s.src.pixel], converted[i]);
                for (int64_t i = 0; i < count; i++) to[(w + i) * s.dst.pixel + c] = converted[i];
            }
    }
}

inline int64_t units_of(const Step& s) {
    switch (s.kind) {
        case CONV: return groups_of(s) * s.tiles;
        case POINTWISE: return s.pixels;
        case MEAN: return s.images * ((s.channels + LANES - 1) / LANES);
        case INPUT: return s.images * s.in_h;
        default: return s.images * s.out_h;
    }
}

template <class T> void work(const Step& s, int64_t begin, int64_t end) {
    switch (s.kind) {
        case CONV: return conv<T>(s, begin, end);
        case POINTWISE: return pointwise<T>(s, begin, end);
        case MEAN: return mean<T>(s, begin, end);
        case RESIZE: return resize<T>(s, begin, end);
        case INPUT: return input<T>(s, begin, end);
        default: return pool<T>(s, begin, end);
    }
}

// The first unit of thread `t`'s part of a step; parts of convolutions are equal in vectors, not in tiles.
inline int64_t part(const Step& s, int64_t units, int t, int threads) {
    if (s.kind != CONV) return units * t / threads;
    int64_t vectors = 0;
    for (int64_t n = 0; n < s.tiles; n++) vectors += s.tile[n].channels_out > LANES ? 2 : 1;
    return tile_at(s, groups_of(s), groups_of(s) * vectors * t / threads);
}

struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
};

template <class T> void walk(const Step* steps, int64_t count, int threads) {
    // For each step: the number of finished units, and of started units in each thread's part.
    std::vector<Counter> counters(count * (threads + 1));
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        int64_t since = 0;
        for (int64_t i = 0; i < count; i++) {
            const Step& s = steps[i];
            if (s.wait)
                for (; since < i; since++) {
                    std::atomic<int64_t>& done = counters[since * (threads + 1)].value;
                    int64_t all = units_of(steps[since]);
                    for (int spins = 0; done.load(std::memory_order_acquire) < all; spins++)
                        if (spins > 2000) std::this_thread::yield();
                }
            Counter* counter = &counters[i * (threads + 1)];
            int64_t units = units_of(s), chunk = units / (8 * threads) + 1;
            for (int t = 0; t < threads; t++) {
                int owner = (thread + t) % threads;
                int64_t begin = part(s, units, owner, threads), end = part(s, units, owner + 1, threads);
                for (;;) {
                    int64_t first = begin + counter[1 + owner].value.fetch_add(chunk, std::memory_order_relaxed);
                    if (first >= end) break;
                    int64_t last = first + chunk < end ? first + chunk : end;
                    work<T>(s, first, last);
                    counter->value.fetch_add(last - first, std::memory_order_release);
                }
            }
        }
    }
}

}  // namespace

extern "C" {

int lanes() { return LANES; }

int rows() { return ROWS; }

// Whether this machine has instructions for bfloat16 products.
int has_bf16() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

void run(const Step* steps, int64_t count, int threads, int is_bf16) {
    if (is_bf16) walk<bf16>(steps, count, threads);
    else walk<float>(steps, count, threads);
}
}
