// BatchNorm in training, fused with adjacent operations, for res2net_zoo/kernels/fused_norm.py: two passes over
// memory in forward, two in backward.
//
// The layer is limited by memory bandwidth, so the number of reads of each tensor determines its speed. The
// normalizing pass includes the activation, an addition before it (of a shortcut) and an addition after it (the
// next group's input, Eq. 1); groups of channels can be separate tensors, which avoids split and concatenation.

#include <algorithm>
#include <omp.h>
#include <vector>

#include "vectors.h"

namespace {

// Pixels by channels: channels are contiguous, and pixels are `pitch` elements apart.
struct Matrix {
    void* data;
    int64_t pitch;
};

// A group of a layer's channels. Missing tensors are null. GROUP in fused_norm.py lists the same fields.
struct Group {
    int64_t first, channels;
    Matrix x, y;         // y = act(norm(x) + add)
    Matrix add;          // such as the shortcut
    Matrix next, sum;    // sum = y + next
    Matrix dy, dsum;     // gradients of y and of sum
    Matrix dx, dadd;     // gradients of x and of add
};

struct Norm {
    int64_t pixels, channels, groups, relu;
    const float *weight, *bias;
    float *mean, *invstd, *scale;  // norm(x) = scale * (x - mean) + bias
    float *running_mean, *running_var;
    float *dweight, *dbias;
    Group group[];
};

constexpr int64_t STEP = 32;       // minimum number of pixels per thread
constexpr int64_t FOLD = 1024;     // number of pixels that are summed in float32

template <class T> inline T* at(const Matrix& x, int64_t m, int64_t c) { return static_cast<T*>(x.data) + m * x.pitch + c; }

// A vector of a group's channels: full, or partial at the end of the group.
struct Whole {
    Lanes some;
    Whole(const Group&, int64_t) : some(ALL) {}
    template <class T> Vec read(const T* p) const { return load(p, ALL); }
};
struct Rest {
    Lanes some;
    Rest(const Group& g, int64_t c) : some(first(g.channels - c)) {}
    template <class T> Vec read(const T* p) const { return load_over(p, some); }
};
struct Last : Rest {  // where memory may end
    using Rest::Rest;
    template <class T> Vec read(const T* p) const { return load(p, some); }
};

template <class Kind, int VECTORS> struct Span : Kind {
    using Kind::Kind;
    static constexpr int N = VECTORS;
};

// Call f(group, channel, span, m0, m1) for tiles of pixels and channels. Few pixels per tile are read in memory
// order; many keep sums in registers longer.
template <class F> inline void tiles(const Norm& s, int64_t begin, int64_t end, F f) {
    constexpr int WIDTH = 4;
    int64_t rows = s.channels <= WIDTH * LANES ? 32 : s.group->channels % LANES ? 8 : 1;
    int64_t last = s.pixels - LANES - 1;
    for (int64_t m0 = begin; m0 < end; m0 += rows) {
        int64_t m1 = std::min(m0 + rows, end);
        for (const Group* g = s.group; g < s.group + s.groups; g++) {
            int64_t c = 0;
            for (; c + WIDTH * LANES <= g->channels; c += WIDTH * LANES) f(*g, c, Span<Whole, WIDTH>(*g, c), m0, m1);
            for (; c + LANES <= g->channels; c += LANES) f(*g, c, Span<Whole, 1>(*g, c), m0, m1);
            if (c == g->channels) continue;
            if (m1 <= last) f(*g, c, Span<Rest, 1>(*g, c), m0, m1);
            else f(*g, c, Span<Last, 1>(*g, c), m0, m1);
        }
    }
}

// Two sums per channel: in forward of x - origin and its square; in backward of the gradient g before the
// activation, which is also written to `dadd` if present, and of g * (x - mean).
template <class T, bool BACK>
void add_up(const Norm& s, const float* origin, int64_t begin, int64_t end, float* sums, float* products) {
    tiles(s, begin, end, [&](const Group& g, int64_t c, auto span, int64_t m0, int64_t m1) {
        constexpr int N = decltype(span)::N;
        Vec sum[N], product[N], scale[N], bias[N], center[N];
        Lanes some = span.some;
        int64_t at0 = g.first + c;
        for (int n = 0; n < N; n++) {
            sum[n] = load(sums + at0 + n * LANES, some), product[n] = load(products + at0 + n * LANES, some);
            center[n] = load(origin + at0 + n * LANES, some);
            if (BACK) scale[n] = load(s.scale + at0 + n * LANES, some), bias[n] = load(s.bias + at0 + n * LANES, some);
        }
        for (int64_t m = m0; m < m1; m++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                int64_t k = c + n * LANES;
                Vec x = span.read(at<T>(g.x, m, k)), v = x - center[n], w = v;
                if (BACK) {
                    w = span.read(at<T>(g.dy, m, k));
                    if (g.dsum.data) w += span.read(at<T>(g.dsum, m, k));
                    if (s.relu) w = where_positive(g.y.data ? span.read(at<T>(g.y, m, k)) : scale[n] * v + bias[n], w);
                    if (g.dadd.data) store(at<T>(g.dadd, m, k), w, some);
                }
                sum[n] += w, product[n] += v * w;
            }
        for (int n = 0; n < N; n++) {
            store(sums + at0 + n * LANES, sum[n], some);
            store(products + at0 + n * LANES, product[n], some);
        }
    });
}

template <class T> void normalize(const Norm& s, int64_t begin, int64_t end) {
    tiles(s, begin, end, [&](const Group& g, int64_t c, auto span, int64_t m0, int64_t m1) {
        constexpr int N = decltype(span)::N;
        Vec scale[N], mean[N], bias[N], floor = splat(s.relu ? 0 : -INFINITY);
        Lanes some = span.some;
        for (int n = 0; n < N; n++) {
            int64_t k = g.first + c + n * LANES;
            scale[n] = load(s.scale + k, some), mean[n] = load(s.mean + k, some), bias[n] = load(s.bias + k, some);
        }
        for (int64_t m = m0; m < m1; m++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                int64_t k = c + n * LANES;
                Vec v = scale[n] * (span.read(at<T>(g.x, m, k)) - mean[n]) + bias[n];
                if (g.add.data) v += span.read(at<T>(g.add, m, k));
                v = max(v, floor);
                store(at<T>(g.y, m, k), v, some);
                if (g.sum.data) store(at<T>(g.sum, m, k), v + span.read(at<T>(g.next, m, k)), some);
            }
    });
}

// dx = scale * (g - mean(g) - xhat * mean(g * xhat)): `sums` and `products` hold the means, the second over std.
template <class T> void propagate(const Norm& s, const float* sums, const float* products, int64_t begin, int64_t end) {
    tiles(s, begin, end, [&](const Group& g, int64_t c, auto span, int64_t m0, int64_t m1) {
        constexpr int N = decltype(span)::N;
        Vec scale[N], bias[N], mean[N], sum[N], product[N];
        Lanes some = span.some;
        for (int n = 0; n < N; n++) {
            int64_t k = g.first + c + n * LANES;
            scale[n] = load(s.scale + k, some), bias[n] = load(s.bias + k, some), mean[n] = load(s.mean + k, some);
            sum[n] = load(sums + k, some), product[n] = load(products + k, some);
        }
        for (int64_t m = m0; m < m1; m++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                int64_t k = c + n * LANES;
                Vec v = span.read(at<T>(g.x, m, k)) - mean[n], w;
                if (g.dadd.data) w = span.read(at<T>(g.dadd, m, k));
                else {
                    w = span.read(at<T>(g.dy, m, k));
                    if (g.dsum.data) w += span.read(at<T>(g.dsum, m, k));
                    if (s.relu) w = where_positive(scale[n] * v + bias[n], w);
                }
                store(at<T>(g.dx, m, k), scale[n] * (w - sum[n] - v * product[n]), some);
            }
    });
}

template <class T, bool BACK> void run(const Norm& s, double momentum, double eps, int threads) {
    int64_t chs = s.channels;
    std::vector<float> origin(chs);
    std::vector<float> sums(chs), products(chs);
    std::vector<std::vector<double>> parts(threads);
    if (!BACK)  // subtracting the first pixel avoids cancellation
        for (const Group* g = s.group; g < s.group + s.groups; g++)
            for (int64_t c = 0; c < g->channels; c++) origin[g->first + c] = widen(*at<T>(g->x, 0, c));
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t steps = (s.pixels + STEP - 1) / STEP;
        int64_t begin = std::min(steps * thread / all * STEP, s.pixels);
        int64_t end = std::min(steps * (thread + 1) / all * STEP, s.pixels);
        std::vector<double>& part = parts[thread];
        part.resize(2 * chs);
        std::vector<float> own(2 * chs);
        for (int64_t m = begin; m < end; m += FOLD) {
            std::fill(own.begin(), own.end(), 0);
            add_up<T, BACK>(s, BACK ? s.mean : origin.data(), m, std::min(m + FOLD, end), &own[0], &own[chs]);
            for (int64_t c = 0; c < 2 * chs; c++) part[c] += own[c];
        }
#pragma omp barrier
#pragma omp single
        for (int64_t c = 0; c < chs; c++) {
            double a = 0, b = 0;
            for (int t = 0; t < all; t++) a += parts[t][c], b += parts[t][chs + c];
            if (BACK) {
                if (s.dbias) s.dbias[c] = a, s.dweight[c] = b * s.invstd[c];
                sums[c] = a / s.pixels, products[c] = b / s.pixels * s.invstd[c] * s.invstd[c];
                continue;
            }
            a /= s.pixels;
            double mean = origin[c] + a, var = std::max(b / s.pixels - a * a, 0.0), invstd = 1 / std::sqrt(var + eps);
            s.mean[c] = mean, s.invstd[c] = invstd;
            s.scale[c] = s.weight[c] * invstd;
            s.running_mean[c] += momentum * (mean - s.running_mean[c]);
            s.running_var[c] += momentum * (var * s.pixels / (s.pixels - 1) - s.running_var[c]);
        }
        if (BACK) propagate<T>(s, &sums[0], &products[0], begin, end);
        else normalize<T>(s, begin, end);
    }
}

}  // namespace

extern "C" {

void forward(const Norm* norm, double momentum, double eps, int threads, int is_bf16) {
    if (is_bf16) run<bf16, false>(*norm, momentum, eps, threads);
    else run<float, false>(*norm, momentum, eps, threads);
}

void backward(const Norm* norm, int threads, int is_bf16) {
    if (is_bf16) run<bf16, true>(*norm, 0, 0, threads);
    else run<float, true>(*norm, 0, 0, threads);
}
}
