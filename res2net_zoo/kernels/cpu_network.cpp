// The native steps of res2net_zoo/kernels/cpu_network.py: convolutional networks on CPUs, one call per inference.
//
// A network is a list of steps over buffers of activations in NHWC layout, in float32, bfloat16 or 8-bit integers; sums
// are float32, or int32 of integers. Buffers of padded convolutions have a border of zeros, so that taps need no bounds
// check. All threads execute the list together. Each starts with its part of a step and then steals work from the
// others' parts. They synchronize only if a step reads the output of earlier ones, and then wait for the work,
// not for each other: if a thread is scheduled late, the others have done its part.
//
// A convolution is a matrix product of pixels and output channels without the usual copy of the input
// (Dukhan, "The Indirect Convolution Algorithm", arXiv 1907.02129): a tile of ROWS pixels by two vectors of
// channels stays in registers, see products.h. Tile registers load pixels at a fixed distance, so the input
// of convolutions other than 1x1 is first copied, one block of pixels at a time.
//
// 8-bit integers q have the values scale * (q - zero). A convolution rescales its sums per channel to the scale of
// its output, so that it adds, activates and rounds once.

#include <atomic>
#include <omp.h>
#include <thread>
#include <vector>

#include "products.h"

namespace {

enum Kind { CONV, POINTWISE, MAX_POOL, AVG_POOL, MEAN, RESIZE, INPUT };
enum Act { NONE, RELU, SIGMOID };

// The output channels of one tile: their input channels, and their weights by tap and input channel, with
// LANES * vectors for each (in bfloat16 those of two channels are interleaved, in 8 bits those of four). In 8 bits the
// output is scale * sum + bias.
struct Tile {
    const void* weight;
    const float* bias;
    const float* scale;
    int64_t first_in, channels_in, first_out, channels_out;
};

// A step's view of a buffer: element 0 of pixel (0, 0), and the offsets of the other pixels.
struct View {
    void* data;
    const int32_t* pixels;  // offset of each output pixel of the step (for a source: that of its first tap)
    int64_t image, row, pixel;  // the same as strides, for steps that iterate over windows
    float scale, zero;          // of 8-bit integers; in a convolution relative to its output
};

struct Step {
    int64_t kind, act, wait;
    int64_t pixels, channels;  // of the output
    View src, gate, add, dst, also;  // `also` += the output in `dst`
    int64_t dst_is_float;
    int64_t paired;     // whether the channels of tiles of 32 have the order of `pack`
    float floor;        // minimum of a convolution's output
    float gain, shift;  // 8 bits: also = gain * output + also.scale * also + shift
    int64_t rows;       // maximum number of pixels per tile
    int64_t bytes;      // tile registers: bytes of a pixel's input, a multiple of 64; 0 without them
    int64_t panel;      // tile registers: bytes from one copied pixel to the next; 0 if pixels are not copied
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

// Values of 8-bit integers; floats are unchanged.
template <class T> inline Vec read(const View& v, const T* p, Lanes some) {
    Vec x = load(p, some);
    return sizeof(T) == 1 ? fma(x, splat(v.scale), splat(-v.scale * v.zero)) : x;
}
template <class T> inline void write(const View& v, T* p, Vec x, Lanes some) {
    if (sizeof(T) == 1) x = max(fma(x, splat(1 / v.scale), splat(v.zero)), zero());
    store(p, x, some);
}

// The end of a convolution: scale, add, activate, store. It copies the step's fields, because the compiler must assume
// that stores alias the originals.
template <class T> struct Epilogue {
    const View add, dst, also;
    const bool to_float, above_zero;
    const Vec floor, gain, shift;
    static constexpr bool INT = sizeof(T) == 1;

    explicit Epilogue(const Step& s)
        : add(s.add), dst(s.dst), also(s.also), to_float(s.dst_is_float), above_zero(s.floor > 0 || s.also.data),
          floor(splat(s.floor)), gain(splat(s.gain)), shift(splat(s.shift)) {}

    // The sums of pixel m and of the output channels from c.
    ALWAYS_INLINE void operator()(int64_t m, int64_t c, Vec v, Lanes some) const {
        if (add.data) {
            Vec other = load(at<T>(add, m) + c, some);
            v = INT ? fma(other, splat(add.scale), v) : v + other;
        }
        v = max(v, floor);
        if (to_float) store(at<float>(dst, m) + c, v, some);
        else store(at<T>(dst, m) + c, v, some);
        if (also.data) {
            T* p = at<T>(also, m) + c;
            Vec other = load(p, some);
            v = INT ? fma(v, gain, fma(other, splat(also.scale), shift)) : v + other;
            store(p, INT ? max(v, zero()) : v, some);
        }
    }

#ifdef WIDE
    // The sums of pixel m and of 32 output channels from c, in the order of `pack`, which replaces negative values by
    // 0.
    ALWAYS_INLINE void pair(int64_t m, int64_t c, Vec v, Vec w, __mmask32 some) const {
        Vec x, y;
        if (add.data) {
            unpack(_mm256_maskz_loadu_epi8(some, at<u8>(add, m) + c), x, y);
            v = fma(x, splat(add.scale), v), w = fma(y, splat(add.scale), w);
        }
        if (above_zero) v = max(v, floor), w = max(w, floor);
        _mm256_mask_storeu_epi8(at<u8>(dst, m) + c, some, pack(v, w));
        if (also.data) {
            u8* p = at<u8>(also, m) + c;
            unpack(_mm256_maskz_loadu_epi8(some, p), x, y);
            v = fma(v, gain, fma(x, splat(also.scale), shift)), w = fma(w, gain, fma(y, splat(also.scale), shift));
            _mm256_mask_storeu_epi8(p, some, pack(v, w));
        }
    }
#endif
};

template <class T, int M, int N> __attribute__((noinline)) void tile(const Step& s, const Tile& t, int64_t m0) {
    const T* x[M];
    for (int m = 0; m < M; m++) x[m] = at<T>(s.src, m0 + m) + t.first_in;
    for (int m = 0; m < M; m++)  // prefetch for the epilogue
        for (int n = 0; n < N * LANES; n += 64 / sizeof(T)) {
            if (s.add.data) __builtin_prefetch(at<T>(s.add, m0 + m) + t.first_out + n);
            __builtin_prefetch(at<T>(s.dst, m0 + m) + t.first_out + n, 1);
        }
    Sums<T, M, N> sum;
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++)
            if constexpr (sizeof(T) == 1) sum[m][n] = no_sum();
            else memcpy(&sum[m][n], t.bias + LANES * n, sizeof(Vec));
    multiply<T, M, N>(sum, x, static_cast<const T*>(t.weight), s.tap, s.taps, t.channels_in);
    Epilogue<T> finish(s);
#ifdef WIDE
    if constexpr (sizeof(T) == 1 && N == 2)
        if (s.paired) {
            Vec scale[2] = {load(t.scale, ALL), load(t.scale + LANES, ALL)};
            Vec bias[2] = {load(t.bias, ALL), load(t.bias + LANES, ALL)};
            __mmask32 some = first_bytes(t.channels_out);
            for (int m = 0; m < M; m++)
                finish.pair(m0 + m, t.first_out, fma(as_float(sum[m][0]), scale[0], bias[0]),
                            fma(as_float(sum[m][1]), scale[1], bias[1]), some);
            return;
        }
#endif
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
        int64_t c = t.first_out + LANES * n;
        Lanes some = first(t.channels_out - LANES * n);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
            if constexpr (sizeof(T) == 1) {
                Vec scale = load(t.scale + LANES * n, ALL), bias = load(t.bias + LANES * n, ALL);
                finish(m0 + m, c, fma(as_float(sum[m][n]), scale, bias), some);
            } else finish(m0 + m, c, sum[m][n], some);
    }
}

// Call tile<T, M, N> for M from 1 to ROWS.
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

inline int64_t groups_of(const Step& s) { return (s.pixels + s.rows - 1) / s.rows; }

// A unit of a convolution's work: a tile of a group of pixels, and the index of the group in its block. Pixels are split
// evenly into groups of at most a tile, and all weights are applied to one block of groups at a time.
struct Unit {
    const Tile* tile;
    int64_t m0, rows, slot;
};

inline Unit unit_of(const Step& s, int64_t groups, int64_t u) {
    int64_t first = u / (s.block * s.tiles) * s.block;
    int64_t size = groups - first < s.block ? groups - first : s.block;
    int64_t inside = u - first * s.tiles, slot = inside % size, group = first + slot;
    int64_t m = s.pixels * group / groups;
    return {&s.tile[inside / size], m, s.pixels * (group + 1) / groups - m, slot};
}

// A thread's memory for tile registers.
struct Panels {
    std::vector<char> memory;        // the input of a block's groups of pixels
    std::vector<int64_t> copied;     // for each of these groups, the key of the input in memory, or -1
    const Step* step = nullptr;      // the step whose input it is
    int64_t rows = 0;                // pixels that registers are configured for

    ~Panels() {
#ifdef TILES
        if (rows) _tile_release();
#endif
    }

    char* of(const Step& s, int64_t i) {
        uintptr_t begin = reinterpret_cast<uintptr_t>(memory.data());
        return memory.data() + (-begin & 63) + i * s.rows * s.panel;
    }

    void begin(const Step& s) {
        if (step == &s) return;
        step = &s;
        if (s.panel) {
            size_t size = s.block * s.rows * s.panel + 128;
            if (memory.size() < size) memory.resize(size);
            copied.assign(s.block, -1);
        }
#ifdef TILES
        if (rows != s.rows) configure_tiles(rows = s.rows);
#endif
    }
};

#ifdef TILES
// Copy the input of `rows` pixels: the channels of all taps, in the order of the weights.
template <class T> void copy_taps(const Step& s, const Tile& t, int64_t m0, int64_t rows, char* to) {
    constexpr int STEP = 4 / sizeof(T);  // the number of channels is padded to this
    int64_t bytes = t.channels_in * sizeof(T), width = (t.channels_in + STEP - 1) / STEP * 4, full = bytes / 64 * 64;
    __mmask64 some = (uint64_t(1) << (bytes - full)) - 1;
    if (bytes <= 32) {  // shorter stores cross fewer cache lines
        __mmask32 few = (uint64_t(1) << bytes) - 1;
        for (int64_t m = 0; m < rows; m++, to += s.panel) {
            const char* pixel = reinterpret_cast<const char*>(at<T>(s.src, m0 + m) + t.first_in);
            char* p = to;
            for (int64_t i = 0; i < s.taps; i++, p += width)
                _mm256_storeu_epi8(p, _mm256_maskz_loadu_epi8(few, pixel + s.tap[i] * int64_t(sizeof(T))));
            _mm512_storeu_si512(p, _mm512_setzero_si512());
        }
        return;
    }
    for (int64_t m = 0; m < rows; m++, to += s.panel) {
        const char* pixel = reinterpret_cast<const char*>(at<T>(s.src, m0 + m) + t.first_in);
        char* p = to;
        for (int64_t i = 0; i < s.taps; i++, p += width) {  // a store may overlap the next tap, which is stored later
            const char* from = pixel + s.tap[i] * int64_t(sizeof(T));
            for (int64_t k = 0; k < full; k += 64) _mm512_storeu_si512(p + k, _mm512_loadu_si512(from + k));
            if (bytes > full) _mm512_storeu_si512(p + full, _mm512_maskz_loadu_epi8(some, from + full));
        }
        _mm512_storeu_si512(p, _mm512_setzero_si512());  // the rest has zero weights, but NaN * 0 is NaN
    }
}

// Sum the products of a tile of a convolution with tile registers, and call `between` after each part.
template <class T, class F>
void sum_tile(const Step& s, const Unit& one, Panels& panels, TileSums<T>& sums, F between) {
    const Tile& t = *one.tile;
    const char* x = reinterpret_cast<const char*>(at<T>(s.src, one.m0) + t.first_in);
    int64_t pitch = s.src.pixel * sizeof(T);
    if (s.panel) {
        x = panels.of(s, one.slot), pitch = s.panel;
        int64_t key = one.m0 << 20 | t.first_in;
        if (panels.copied[one.slot] != key) {
            copy_taps<T>(s, t, one.m0, one.rows, panels.of(s, one.slot));
            panels.copied[one.slot] = key;
        }
    }
    const char* w = static_cast<const char*>(t.weight);
    int64_t upper = s.rows > TILE ? (s.rows + 1) / 2 : s.rows;
    bool two = t.channels_out > LANES;
    if (s.rows > TILE && two) multiply_tiles<T, 2, 2>(sums, upper, x, pitch, w, s.bytes, between);
    else if (s.rows > TILE) multiply_tiles<T, 2, 1>(sums, upper, x, pitch, w, s.bytes, between);
    else if (two) multiply_tiles<T, 1, 2>(sums, upper, x, pitch, w, s.bytes, between);
    else multiply_tiles<T, 1, 1>(sums, upper, x, pitch, w, s.bytes, between);
}

// Writes the output of a tile, some rows at a time.
template <class T> struct Finisher {
    const Epilogue<T> finish;
    const TileSums<T>* sums = nullptr;
    int64_t m0 = 0, c = 0, next = 0, rows = 0;
    int count = 0;
    const bool paired;
    __mmask32 both = 0;
    Vec bias[2], scale[2];
    Lanes some[2];

    explicit Finisher(const Step& s) : finish(s), paired(s.paired) {}

    void start(const Unit& one, const TileSums<T>& of) {
        const Tile& t = *one.tile;
        both = first_bytes(t.channels_out);
        sums = &of, m0 = one.m0, rows = one.rows, c = t.first_out, next = 0, count = t.channels_out > LANES ? 2 : 1;
        for (int n = 0; n < count; n++) {
            bias[n] = load(t.bias + LANES * n, ALL), some[n] = first(t.channels_out - LANES * n);
            if (sizeof(T) == 1) scale[n] = load(t.scale + LANES * n, ALL);
        }
    }
    template <int N> inline void write_rows(int64_t begin, int64_t end) const {
        const Finisher own = *this;  // the compiler must assume that stores alias the fields
        if constexpr (sizeof(T) == 1 && N == 2)
            if (paired) {
                for (int64_t m = begin; m < end; m++)
                    own.finish.pair(own.m0 + m, own.c, fma(as_float(own.sums->of[m][0]), own.scale[0], own.bias[0]),
                                    fma(as_float(own.sums->of[m][1]), own.scale[1], own.bias[1]), own.both);
                return;
            }
        for (int64_t m = begin; m < end; m++)
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) {
                Vec v;
                if constexpr (sizeof(T) == 1) v = fma(as_float(own.sums->of[m][n]), own.scale[n], own.bias[n]);
                else v = own.sums->of[m][n] + own.bias[n];
                own.finish(own.m0 + m, own.c + LANES * n, v, own.some[n]);
            }
    }
    inline void advance(int64_t by) {
        int64_t end = next + by < rows ? next + by : rows;
        if (count == 2) write_rows<2>(next, end);
        else write_rows<1>(next, end);
        next = end;
    }
};

// Compute tiles `u` to `end` of a convolution with tile registers. The end of a tile overlaps with the sums of the
// next one, because they use different execution units.
template <class T> void matrix_conv(const Step& s, int64_t u, int64_t end, Panels& panels) {
    int64_t groups = groups_of(s);
    panels.begin(s);
    TileSums<T> sums[2];
    Finisher<T> last(s);
    int64_t steps = s.bytes / TILE_BYTES, by = (s.rows + steps - 1) / steps;
    for (int64_t i = 0; u < end; u++, i ^= 1) {
        Unit one = unit_of(s, groups, u);
        sum_tile<T>(s, one, panels, sums[i], [&] { last.advance(by); });
        last.start(one, sums[i]);
    }
    last.advance(s.rows);
}
#endif

// Compute tiles `u` to `end` of a convolution.
template <class T> void conv(const Step& s, int64_t u, int64_t end, Panels& panels) {
#ifdef TILES
    if constexpr (sizeof(T) < 4)
        if (s.bytes) return matrix_conv<T>(s, u, end, panels);
#endif
    int64_t groups = groups_of(s);
    for (; u < end; u++) {
        Unit one = unit_of(s, groups, u);
        if (one.tile->channels_out > LANES) tile_of<T, 2>(one.rows, s, *one.tile, one.m0);
        else tile_of<T, 1>(one.rows, s, *one.tile, one.m0);
    }
}

template <class T> void pointwise(const Step& s, int64_t m, int64_t end) {
    for (; m < end; m++)
        for (int64_t c = 0; c < s.channels; c += LANES) {
            Lanes some = first(s.channels - c);
            Vec v = read(s.src, at<T>(s.src, m) + c, some);
            if (s.gate.data) v *= read(s.gate, at<T>(s.gate, m) + c, some);
            if (s.add.data) v = read(s.add, at<T>(s.add, m) + c, some) + v;
            v = activate(v, s.act);
            if (s.dst_is_float) store(at<float>(s.dst, m) + c, v, some);
            else write(s.dst, at<T>(s.dst, m) + c, v, some);
        }
}

// The maximum or the sum of bytes in a window, of 64 channels.
template <class S, class F>
inline void reduce(const Step& s, const u8* from, int64_t rows, int64_t columns, S* to, F f) {
    for (int i = 0; i < 64; i++) to[i] = 0;
    for (int64_t h = 0; h < rows; h++, from += s.src.row)
        for (int64_t w = 0; w < columns; w++)
            for (int i = 0; i < 64; i++) to[i] = f(to[i], from[w * s.src.pixel + i]);
}

// Pool the window of an output pixel, in integers.
inline void pool_bytes(const Step& s, int64_t n, int64_t h0, int64_t w0, int64_t rows, int64_t columns, float scale,
                       u8* to) {
    // real = scale * src.scale * (sum - count * zero)
    Vec gain = splat(scale * s.src.scale / s.dst.scale);
    int64_t zeros = s.kind == MAX_POOL ? 1 : rows * columns;
    Vec shift = splat(std::fma(-scale * s.src.scale / s.dst.scale, s.src.zero * zeros, s.dst.zero));
    for (int64_t c = 0; c < s.channels; c += 64) {
        int64_t count = s.channels - c < 64 ? s.channels - c : 64;
        const u8* from = at<u8>(s.src, n, h0, w0) + c;
        u8 largest[64];
        uint16_t sum[64];
        float sums[64];
        if (s.kind == MAX_POOL) reduce(s, from, rows, columns, largest, [](u8 a, u8 b) { return a > b ? a : b; });
        else reduce(s, from, rows, columns, sum, [](uint16_t a, u8 b) { return static_cast<uint16_t>(a + b); });
        if (s.kind == MAX_POOL && s.src.scale == s.dst.scale && s.src.zero == s.dst.zero) {
            memcpy(to + c, largest, count);
            continue;
        }
        for (int i = 0; i < 64; i++) sums[i] = s.kind == MAX_POOL ? largest[i] : sum[i];
        for (int64_t i = 0; i < count; i += LANES)
            store(to + c + i, max(fma(load(sums + i, ALL), gain, shift), zero()), first(count - i));
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
            if constexpr (sizeof(T) == 1)
                if ((h1 - h0) * (w1 - w0) <= 257) {  // 257 * 255 fits in 16 bits
                    if (s.kind == MAX_POOL) scale = 1;
                    pool_bytes(s, n, h0, w0, h1 - h0, w1 - w0, scale, at<u8>(s.dst, n, oh, ow));
                    continue;
                }
            for (int64_t c = 0; c < s.channels; c += LANES) {
                Lanes some = first(s.channels - c);
                Vec v = s.kind == MAX_POOL ? splat(-INFINITY) : zero();
                for (int64_t h = h0; h < h1; h++)
                    for (int64_t w = w0; w < w1; w++) {
                        Vec x = read(s.src, at<T>(s.src, n, h, w) + c, some);
                        v = s.kind == MAX_POOL ? max(x, v) : v + x;
                    }
                if (s.kind == AVG_POOL) v *= splat(scale);
                write(s.dst, at<T>(s.dst, n, oh, ow) + c, v, some);
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
            for (int64_t w = 0; w < s.in_w; w++) v += read(s.src, at<T>(s.src, n, h, w) + c, some);
        v *= splat(1.0f / (s.in_h * s.in_w));
        if (s.dst_is_float) store(at<float>(s.dst, n, 0, 0) + c, v, some);
        else write(s.dst, at<T>(s.dst, n, 0, 0) + c, v, some);
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
                    return fma(splat(x), read(s.src, at<T>(s.src, n, h, right) + c, some),
                               splat(1 - x) * read(s.src, at<T>(s.src, n, h, left) + c, some));
                };
                write(s.dst, at<T>(s.dst, n, oh, ow) + c, fma(splat(y), row(bottom), splat(1 - y) * row(top)), some);
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
                float gathered[LANES];
                if (s.src.pixel != 1)
                    for (int64_t i = 0; i < count; i++) gathered[i] = pixels[i * s.src.pixel];
                write(s.dst, converted, load(s.src.pixel == 1 ? pixels : gathered, first(count)), first(count));
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

template <class T> void work(const Step& s, int64_t begin, int64_t end, Panels& panels) {
    switch (s.kind) {
        case CONV: return conv<T>(s, begin, end, panels);
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
        Panels panels;
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
                    work<T>(s, first, last, panels);
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

// Pixels per tile of tile registers, or 0 if this machine lacks them or does not permit this process to use them.
int tiled_pixels() {
#ifdef TILES
    static const bool permitted = permit_tiles();
    return permitted ? TILED_PIXELS : 0;
#else
    return 0;
#endif
}

// Run steps whose elements have this number of bytes: float32, bfloat16 or 8-bit integers.
void run(const Step* steps, int64_t count, int threads, int bytes) {
    if (bytes == 1) walk<u8>(steps, count, threads);
    else if (bytes == 2) walk<bf16>(steps, count, threads);
    else walk<float>(steps, count, threads);
}
}
