/* Antialiased resize of 8-bit RGB: pixels equal to those of torch's on the CPU, to the last bit.
 *
 * Weights are computed as doubles, normalised, and rounded to 16 bits, with as many binary places as the largest of an
 * axis allows. Rows are filtered first, to 8 bits, then columns. Only the window that is asked for is made, strip by
 * strip, so that what is worked on stays in the cache.
 *
 * Only the last part knows Python; nothing in it or before it keeps state, so that threads may call it together.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Loops for any processor, for AVX2, and for AVX-512 with its instruction for sums of two products (VNNI). */
enum { PORTABLE, WITH_AVX2, WITH_AVX512 };

#if defined(__x86_64__) && defined(__GNUC__)
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vnni")))
#include <immintrin.h>
static int best_level(void) {
    if (!__builtin_cpu_supports("avx2")) return PORTABLE;
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni") ? WITH_AVX512 : WITH_AVX2;
}
#else
static int best_level(void) { return PORTABLE; }
#endif

enum { STRIP = 8, LINE = 64, SMALLEST_BITS = 15, MOST_PLACES = 22, WIDEST_SPREAD = 1 << 16 };

/* Which pixels of the source each output is made of. */
typedef struct {
    int64_t in;        /* pixels of the source */
    int aligned;       /* whether every first weight lies on an even one */
    int64_t count;     /* outputs */
    int64_t taps;      /* weights of an output, an even number; zeros behind the last one */
    int64_t longest;   /* most weights that an output uses */
    int64_t low, end;  /* the source pixels that any weight lies on, also where it is zero; end may be beyond the source */
    int places;        /* binary places of the weights */
    int64_t *first;    /* source pixel of an output's first weight */
    int64_t *size;     /* weights that it uses */
    int16_t *weights;  /* [count][taps] */
} Axis;

static void free_axis(Axis *axis) {
    free(axis->first);
    free(axis->size);
    free(axis->weights);
}

/* Keys' cubic convolution with a = -1/2, or a triangle. */
static double filter(double x, int bicubic) {
    const double a = -0.5;
    x = fabs(x);
    if (!bicubic) return x < 1.0 ? 1.0 - x : 0.0;
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    if (x < 2.0) return ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a;
    return 0.0;
}

/* Weights of the outputs from `start` on, of an axis resized from `in` to `out`. Returns 0 where memory is short.
 * `aligned`: every first weight lies on an even pixel. The precision is that of the whole axis. */
static int make_axis(Axis *axis, int64_t in, int64_t out, int64_t start, int64_t count, int bicubic, int aligned) {
    const double scale = (double)in / (double)out, stretch = scale >= 1.0 ? scale : 1.0;
    const double inverse = scale >= 1.0 ? 1.0 / scale : 1.0, support = (bicubic ? 2.0 : 1.0) * stretch;
    const int64_t most = (int64_t)ceil(support) * 2 + 1;
    *axis = (Axis){.in = in, .aligned = aligned, .count = count, .low = in};
    axis->first = malloc(count * sizeof *axis->first);
    axis->size = malloc(count * sizeof *axis->size);
    double *exact = malloc((count + 1) * most * sizeof *exact), largest = 0.0; /* the last row: outside the window */
    if (!axis->first || !axis->size || !exact) {
        free(exact);
        return 0;
    }
    for (int64_t i = 0; i < out; i++) {
        const int64_t row = i >= start && i < start + count ? i - start : count;
        const double center = scale * (i + 0.5);
        double *w = exact + row * most, total = 0.0;
        int64_t first = (int64_t)(center - support + 0.5), last = (int64_t)(center + support + 0.5);
        first = first < 0 ? 0 : first;
        int64_t size = (last < in ? last : in) - first;
        size = size < 0 ? 0 : size > most ? most : size;
        for (int64_t j = 0; j < size; j++) w[j] = filter((j + first - center + 0.5) * inverse, bicubic);
        for (int64_t j = 0; j < size; j++) total += w[j];
        for (int64_t j = 0; j < size && total != 0.0; j++) {
            w[j] /= total;
            largest = w[j] > largest ? w[j] : largest;
        }
        if (row < count) {
            axis->first[row] = first;
            axis->size[row] = size;
            axis->longest = size > axis->longest ? size : axis->longest;
        }
    }
    while (axis->places < MOST_PLACES && (int)(0.5 + largest * (1 << (axis->places + 1))) < 1 << SMALLEST_BITS)
        axis->places++;
    axis->taps = (axis->longest + aligned + 1) / 2 * 2;
    axis->weights = calloc(count * axis->taps, sizeof *axis->weights);
    for (int64_t i = 0; axis->weights && i < count; i++) {
        const int64_t shift = aligned ? axis->first[i] & 1 : 0;
        for (int64_t j = 0; j < axis->size[i]; j++) {
            const double w = exact[i * most + j] * (1 << axis->places);
            axis->weights[i * axis->taps + j + shift] = (int16_t)(w < 0.0 ? (int)(w - 0.5) : (int)(w + 0.5));
        }
        axis->first[i] -= shift;
        axis->low = axis->first[i] < axis->low ? axis->first[i] : axis->low;
        axis->end = axis->first[i] + axis->taps > axis->end ? axis->first[i] + axis->taps : axis->end;
    }
    free(exact);
    return axis->weights != NULL;
}

static uint8_t clip(int32_t sum, int places) {
    sum >>= places;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

/* Filters STRIP rows. */
static void filter_rows(const uint8_t *rows, int64_t stride, const Axis *axis, uint8_t *out, int64_t out_stride) {
    for (int r = 0; r < STRIP; r++, rows += stride, out += out_stride) {
        for (int64_t x = 0; x < axis->count; x++) {
            const int16_t *w = axis->weights + x * axis->taps;
            const uint8_t *p = rows + 3 * axis->first[x];
            int32_t red = 1 << axis->places >> 1, green = red, blue = red;
            for (int64_t t = 0; t < axis->taps; t++, p += 3) {
                red += w[t] * p[0];
                green += w[t] * p[1];
                blue += w[t] * p[2];
            }
            out[3 * x] = clip(red, axis->places);
            out[3 * x + 1] = clip(green, axis->places);
            out[3 * x + 2] = clip(blue, axis->places);
        }
    }
}

/* Makes one row of `bytes` bytes from `size` rows, which may be read up to the next multiple of 64. */
static void filter_columns(const uint8_t *rows, int64_t stride, int64_t bytes, const int16_t *weights, int64_t size,
                           int places, uint8_t *out) {
    for (int64_t i = 0; i < bytes; i += 32) {
        int32_t sums[32];
        for (int k = 0; k < 32; k++) sums[k] = 1 << places >> 1;
        for (int64_t t = 0; t < size; t++)
            for (int k = 0; k < 32; k++) sums[k] += weights[t] * rows[t * stride + i + k];
        for (int k = 0; k < 32 && i + k < bytes; k++) out[i + k] = clip(sums[k], places);
    }
}

#ifdef AVX2

/* The next strip, which is asked for while one is filtered: rows by turns of 8 are more than the processor foresees. */
typedef struct {
    const uint8_t *rows;
    int64_t stride, bytes, step; /* of each row so many bytes; at each call so many lines of the cache */
    int64_t row, at;             /* where it stands */
} Ahead;

static inline void ask(Ahead *ahead) {
    for (int64_t k = 0; k < ahead->step && ahead->row < STRIP; k++) {
        __builtin_prefetch(ahead->rows + ahead->row * ahead->stride + ahead->at);
        if ((ahead->at += LINE) >= ahead->bytes) {
            ahead->at = 0;
            ahead->row++;
        }
    }
}

/* Four sums of products to bytes. In each half of a register, so that interleaving within halves is undone. */
AVX2 static inline __m256i to_bytes(__m256i a, __m256i b, __m256i c, __m256i d, __m128i places) {
    const __m256i ab = _mm256_packs_epi32(_mm256_sra_epi32(a, places), _mm256_sra_epi32(b, places));
    const __m256i cd = _mm256_packs_epi32(_mm256_sra_epi32(c, places), _mm256_sra_epi32(d, places));
    return _mm256_packus_epi16(ab, cd);
}

AVX2 static inline __m256i two_weights(const int16_t *weights) {
    int32_t both;
    memcpy(&both, weights, sizeof both);
    return _mm256_set1_epi32(both);
}

AVX2 static inline __m256i add_products(__m256i sum, __m256i values, __m256i weights) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(values, weights));
}

/* Spreads STRIP rows, `pixels` of each, a multiple of 4, as 16-bit numbers: for every pair of pixels and pair of rows
 * a register, in its lower half r r g g b b 0 0 of the upper row's pixels, in its upper half of the lower row's. */
AVX2 static void spread_rows(const uint8_t *rows, int64_t stride, int64_t pixels, __m256i *spread) {
    const __m256i pair = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
                                          0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
    const __m256i next = _mm256_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1,  //
                                          6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    for (int64_t x = 0; x < pixels; x += 4, rows += 12, spread += STRIP) {
        for (int r = 0; r < STRIP / 2; r++) {
            const uint8_t *upper = rows + 2 * r * stride;
            const __m128i a = _mm_loadu_si128((const __m128i *)upper);
            const __m128i b = _mm_loadu_si128((const __m128i *)(upper + stride));
            const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
            _mm256_store_si256(spread + r, _mm256_shuffle_epi8(both, pair));
            _mm256_store_si256(spread + STRIP / 2 + r, _mm256_shuffle_epi8(both, next));
        }
    }
}

/* As `filter_rows`, from rows that are spread from pixel axis->low on. Writes a byte beyond each row. */
AVX2 static void filter_rows_avx2(const __m256i *spread, Ahead ahead, const Axis *axis, uint8_t *out,
                                  int64_t out_stride) {
    const __m256i half = _mm256_set1_epi32(1 << axis->places >> 1);
    const __m128i places = _mm_cvtsi32_si128(axis->places);
    for (int64_t x = 0; x < axis->count; x++, out += 3) {
        const __m256i *p = spread + (axis->first[x] - axis->low) / 2 * (STRIP / 2);
        const int16_t *w = axis->weights + x * axis->taps;
        ask(&ahead);
        __m256i a = half, b = half, c = half, d = half;
        for (int64_t t = 0; t < axis->taps; t += 2, p += STRIP / 2) {
            const __m256i both = two_weights(w + t);
            a = add_products(a, p[0], both);
            b = add_products(b, p[1], both);
            c = add_products(c, p[2], both);
            d = add_products(d, p[3], both);
        }
        uint32_t made[STRIP]; /* rows 0 2 4 6 1 3 5 7 */
        _mm256_storeu_si256((__m256i *)made, to_bytes(a, b, c, d, places));
        for (int r = 0; r < STRIP; r++) memcpy(out + r * out_stride, made + r / 2 + r % 2 * 4, sizeof *made);
    }
}

AVX2 static void filter_columns_avx2(const uint8_t *rows, int64_t stride, int64_t bytes, const int16_t *weights,
                                     int64_t size, int places, uint8_t *out) {
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << places >> 1);
    for (int64_t i = 0; i < bytes; i += 32) {
        __m256i a = half, b = half, c = half, d = half;
        for (int64_t t = 0; t < size; t += 2) {
            const uint8_t *row = rows + t * stride + i, *next = t + 1 < size ? row + stride : row;
            const __m256i x = _mm256_loadu_si256((const __m256i *)row), y = _mm256_loadu_si256((const __m256i *)next);
            const __m256i low = _mm256_unpacklo_epi8(x, y), high = _mm256_unpackhi_epi8(x, y);
            const __m256i both = two_weights(weights + t);
            a = add_products(a, _mm256_unpacklo_epi8(low, zero), both);
            b = add_products(b, _mm256_unpackhi_epi8(low, zero), both);
            c = add_products(c, _mm256_unpacklo_epi8(high, zero), both);
            d = add_products(d, _mm256_unpackhi_epi8(high, zero), both);
        }
        uint8_t made[32];
        const __m256i sums = to_bytes(a, b, c, d, _mm_cvtsi32_si128(places));
        if (bytes - i >= 32) {
            _mm256_storeu_si256((__m256i *)(out + i), sums);
        } else {
            _mm256_storeu_si256((__m256i *)made, sums);
            memcpy(out + i, made, bytes - i);
        }
    }
}

/* The same with registers of twice the width: four rows, and 64 bytes of a row, instead of two and 32. */

AVX512 static inline __m512i two_weights_512(const int16_t *weights) {
    int32_t both;
    memcpy(&both, weights, sizeof both);
    return _mm512_set1_epi32(both);
}

AVX512 static inline __m512i to_16_bits(__m512i a, __m512i b, __m128i places) {
    return _mm512_packs_epi32(_mm512_sra_epi32(a, places), _mm512_sra_epi32(b, places));
}

AVX512 static inline __m512i four_rows(const uint8_t *rows, int64_t stride) {
    __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)rows));
    four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(rows + stride)), 1);
    four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(rows + 2 * stride)), 2);
    return _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(rows + 3 * stride)), 3);
}

AVX512 static void spread_rows_512(const uint8_t *rows, int64_t stride, int64_t pixels, __m512i *spread) {
    const __m512i pair = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m512i next = _mm512_broadcast_i32x4(
        _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
    for (int64_t x = 0; x < pixels; x += 4, rows += 12, spread += 4) {
        const __m512i upper = four_rows(rows, stride), lower = four_rows(rows + 4 * stride, stride);
        _mm512_store_si512(spread, _mm512_shuffle_epi8(upper, pair));
        _mm512_store_si512(spread + 1, _mm512_shuffle_epi8(lower, pair));
        _mm512_store_si512(spread + 2, _mm512_shuffle_epi8(upper, next));
        _mm512_store_si512(spread + 3, _mm512_shuffle_epi8(lower, next));
    }
}

/* One output of eight rows, 16 bits each: in every quarter r g b 0 of one of the upper rows, then of a lower one. */
AVX512 static inline __m512i filter_once_512(const __m512i *spread, const Axis *axis, int64_t x) {
    const __m512i *p = spread + (axis->first[x] - axis->low);
    const int16_t *w = axis->weights + x * axis->taps;
    __m512i upper = _mm512_set1_epi32(1 << axis->places >> 1), lower = upper;
    for (int64_t t = 0; t < axis->taps; t += 2, p += 2) {
        const __m512i both = two_weights_512(w + t);
        upper = _mm512_dpwssd_epi32(upper, p[0], both);
        lower = _mm512_dpwssd_epi32(lower, p[1], both);
    }
    return to_16_bits(upper, lower, _mm_cvtsi32_si128(axis->places));
}

AVX512 static inline void store_rows(__m512i four, uint8_t *out, int64_t stride) {
    _mm_storeu_si128((__m128i *)out, _mm512_castsi512_si128(four));
    _mm_storeu_si128((__m128i *)(out + stride), _mm512_extracti32x4_epi32(four, 1));
    _mm_storeu_si128((__m128i *)(out + 2 * stride), _mm512_extracti32x4_epi32(four, 2));
    _mm_storeu_si128((__m128i *)(out + 3 * stride), _mm512_extracti32x4_epi32(four, 3));
}

/* Four outputs at a time. Writes up to 13 bytes beyond each row. */
AVX512 static void filter_rows_512(const __m512i *spread, Ahead ahead, const Axis *axis, uint8_t *out,
                                   int64_t out_stride) {
    const __m512i without_zeros = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const int64_t last = axis->count - 1;
    for (int64_t x = 0; x <= last; x += 4, out += 12) {
        ask(&ahead);
        __m512i sums[4];
        for (int k = 0; k < 4; k++) sums[k] = filter_once_512(spread, axis, x + k < last ? x + k : last);
        const __m512 ab = _mm512_castsi512_ps(_mm512_packus_epi16(sums[0], sums[1]));
        const __m512 cd = _mm512_castsi512_ps(_mm512_packus_epi16(sums[2], sums[3]));
        const __m512i upper = _mm512_castps_si512(_mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(2, 0, 2, 0)));
        const __m512i lower = _mm512_castps_si512(_mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 1, 3, 1)));
        store_rows(_mm512_shuffle_epi8(upper, without_zeros), out, out_stride);
        store_rows(_mm512_shuffle_epi8(lower, without_zeros), out + 4 * out_stride, out_stride);
    }
}

AVX512 static void filter_columns_512(const uint8_t *rows, int64_t stride, int64_t bytes, const int16_t *weights,
                                      int64_t size, int places, uint8_t *out) {
    const __m512i zero = _mm512_setzero_si512(), half = _mm512_set1_epi32(1 << places >> 1);
    const __m128i shift = _mm_cvtsi32_si128(places);
    for (int64_t i = 0; i < bytes; i += 64) {
        __m512i a = half, b = half, c = half, d = half;
        for (int64_t t = 0; t < size; t += 2) {
            const uint8_t *row = rows + t * stride + i, *next = t + 1 < size ? row + stride : row;
            const __m512i x = _mm512_loadu_si512(row), y = _mm512_loadu_si512(next);
            const __m512i low = _mm512_unpacklo_epi8(x, y), high = _mm512_unpackhi_epi8(x, y);
            const __m512i both = two_weights_512(weights + t);
            a = _mm512_dpwssd_epi32(a, _mm512_unpacklo_epi8(low, zero), both);
            b = _mm512_dpwssd_epi32(b, _mm512_unpackhi_epi8(low, zero), both);
            c = _mm512_dpwssd_epi32(c, _mm512_unpacklo_epi8(high, zero), both);
            d = _mm512_dpwssd_epi32(d, _mm512_unpackhi_epi8(high, zero), both);
        }
        const __m512i sums = _mm512_packus_epi16(to_16_bits(a, b, shift), to_16_bits(c, d, shift));
        const __mmask64 there = bytes - i >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (bytes - i)) - 1;
        _mm512_mask_storeu_epi8(out + i, there, sums);
    }
}

#endif

/* Filters STRIP rows; `room` is where they may be spread. */
static void filter_strip(const uint8_t *rows, int64_t stride, int64_t span, const Axis *axis, void *room, uint8_t *out,
                         int64_t out_stride, int level) {
#ifdef AVX2
    const uint8_t *read = rows + 3 * axis->low;
    const int64_t turns = level == WITH_AVX512 ? (axis->count + 3) / 4 : axis->count;
    const int64_t lines = STRIP * ((3 * span + LINE - 1) / LINE);
    const Ahead ahead = {.rows = read + STRIP * stride, .stride = stride, .bytes = 3 * span,
                         .step = (lines + turns - 1) / turns};
    if (level == WITH_AVX512) {
        spread_rows_512(read, stride, span, room);
        filter_rows_512(room, ahead, axis, out, out_stride);
        return;
    }
    if (level == WITH_AVX2) {
        spread_rows(read, stride, span, room);
        filter_rows_avx2(room, ahead, axis, out, out_stride);
        return;
    }
#endif
    (void)span, (void)room, (void)level;
    filter_rows(rows, stride, axis, out, out_stride);
}

static void make_row(const uint8_t *rows, int64_t stride, int64_t bytes, const Axis *axis, int64_t y, uint8_t *out,
                     int level) {
    const int16_t *weights = axis->weights + y * axis->taps;
#ifdef AVX2
    if (level == WITH_AVX512) {
        filter_columns_512(rows, stride, bytes, weights, axis->size[y], axis->places, out);
        return;
    }
    if (level == WITH_AVX2) {
        filter_columns_avx2(rows, stride, bytes, weights, axis->size[y], axis->places, out);
        return;
    }
#endif
    (void)level;
    filter_columns(rows, stride, bytes, weights, axis->size[y], axis->places, out);
}

typedef struct {
    uint8_t *pixels;
    int64_t height, width, stride;
} Picture;

/* Makes the window from the two axes, row by row; filtered rows are kept as long as they are needed. */
static int make_window(const Picture *from, const Picture *to, const Axis *across, const Axis *down, int level) {
    const int64_t span = (across->end - across->low + 3) / 4 * 4;       /* pixels of a row that are read */
    const int64_t reach = 3 * (across->low + span) + 4;                 /* bytes of a row that may be touched */
    const int64_t line = (3 * across->count + 76) / 64 * 64;            /* bytes of a filtered row */
    const int64_t room = 2 * (down->longest + STRIP);                   /* filtered rows that are kept */
    uint8_t *filtered = calloc(room, line), *edge = calloc(STRIP, reach);
    uint8_t *spread = level == PORTABLE ? NULL : malloc(span / 2 * STRIP * 16 + 64);
    void *aligned = (void *)(((uintptr_t)spread + 63) / 64 * 64);
    const int ready = filtered && edge && (spread || level == PORTABLE);
    int64_t base = down->first[0], done = base; /* the filtered rows are base .. done */
    for (int64_t y = 0; ready && y < to->height; y++) {
        const int64_t first = down->first[y], size = down->size[y];
        if (done < first) base = done = first;
        while (done < first + size) {
            if (done + STRIP - base > room) {
                memmove(filtered, filtered + (first - base) * line, (done - first) * line);
                base = first;
            }
            const uint8_t *rows = from->pixels + done * from->stride;
            int64_t stride = from->stride;
            if (done + STRIP > from->height ||
                (done + STRIP - 1) * stride + reach > (from->height - 1) * stride + 3 * from->width) {
                for (int64_t r = 0; r < STRIP && done + r < from->height; r++)
                    memcpy(edge + r * reach, rows + r * stride, 3 * from->width < reach ? 3 * from->width : reach);
                rows = edge;
                stride = reach;
            }
            filter_strip(rows, stride, span, across, aligned, filtered + (done - base) * line, line, level);
            done = done + STRIP < from->height ? done + STRIP : from->height;
        }
        make_row(filtered + (first - base) * line, line, 3 * to->width, down, y, to->pixels + y * to->stride, level);
    }
    free(filtered);
    free(edge);
    free(spread);
    return ready;
}

/* ------------------------------------------------------------------------------------------------------ Python */

/* Takes a buffer's pixels; what does not have the layout that the loops rely on is refused. */
static int as_picture(PyObject *object, int flags, const char *name, Py_buffer *view, Picture *picture) {
    if (PyObject_GetBuffer(object, view, flags) < 0) return 0;
    const Py_ssize_t *shape = view->shape, *strides = view->strides;
    if (view->itemsize == 1 && view->ndim == 3 && shape[0] > 0 && shape[1] > 0 && shape[2] == 3 && strides[2] == 1 &&
        (shape[1] == 1 || strides[1] == 3) && (shape[0] == 1 || strides[0] >= 3 * shape[1]) &&
        shape[0] <= INT32_MAX && shape[1] <= INT32_MAX / 3) {
        *picture = (Picture){view->buf, shape[0], shape[1], shape[0] == 1 ? 3 * shape[1] : strides[0]};
        return 1;
    }
    PyErr_Format(PyExc_ValueError, "%s must be uint8 [height, width, 3] of whole rows, not empty", name);
    PyBuffer_Release(view);
    return 0;
}

static void free_capsule(PyObject *capsule) {
    Axis *axis = PyCapsule_GetPointer(capsule, "axis");
    free_axis(axis);
    free(axis);
}

static PyObject *axis(PyObject *module, PyObject *args) {
    Py_ssize_t in, out, start, count;
    int bicubic, aligned, made;
    (void)module;
    if (!PyArg_ParseTuple(args, "nnnnpp", &in, &out, &start, &count, &bicubic, &aligned)) return NULL;
    if (in < 1 || in > INT32_MAX / 3 || out < 1 || out > INT32_MAX || count < 1 || start < 0 || start > out - count) {
        PyErr_SetString(PyExc_ValueError, "the window must lie inside the resized picture");
        return NULL;
    }
    Axis *axis = calloc(1, sizeof *axis);
    if (!axis) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    made = make_axis(axis, in, out, start, count, bicubic, aligned);
    Py_END_ALLOW_THREADS
    PyObject *capsule = made ? PyCapsule_New(axis, "axis", free_capsule) : PyErr_NoMemory();
    if (!capsule) {
        free_axis(axis);
        free(axis);
    }
    return capsule;
}

static PyObject *resize_pictures(const Picture *from, const Picture *to, const Axis *across, const Axis *down,
                                 int level) {
    if (!across->aligned || across->in != from->width || across->count != to->width || down->aligned ||
        down->in != from->height || down->count != to->height) {
        PyErr_SetString(PyExc_ValueError, "the axes must be those of source and target");
        return NULL;
    }
    const int best = best_level(), fits = across->end - across->low <= WIDEST_SPREAD;
    int made;
    Py_BEGIN_ALLOW_THREADS
    made = make_window(from, to, across, down, !fits || level < PORTABLE ? PORTABLE : level < best ? level : best);
    Py_END_ALLOW_THREADS
    if (!made) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *resize(PyObject *module, PyObject *args) {
    PyObject *source, *target, *across, *down, *result = NULL;
    const Axis *axes[2];
    int level;
    Py_buffer source_view, target_view;
    Picture from, to;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOi", &source, &target, &across, &down, &level) ||
        !(axes[0] = PyCapsule_GetPointer(across, "axis")) || !(axes[1] = PyCapsule_GetPointer(down, "axis")) ||
        !as_picture(source, PyBUF_STRIDED_RO, "source", &source_view, &from))
        return NULL;
    if (as_picture(target, PyBUF_STRIDED, "target", &target_view, &to)) {
        result = resize_pictures(&from, &to, axes[0], axes[1], level);
        PyBuffer_Release(&target_view);
    }
    PyBuffer_Release(&source_view);
    return result;
}

static int set_up(PyObject *module) { return PyModule_AddIntConstant(module, "LEVEL", best_level()); }

static PyMethodDef methods[] = {
    {"axis", axis, METH_VARARGS,
     "axis(length, resized, start, count, bicubic, aligned)\n\n"
     "Return the weights of the outputs start .. start + count of an axis; aligned: for resize's across."},
    {"resize", resize, METH_VARARGS,
     "resize(source, target, across, down, level)\n\n"
     "Fill target, uint8 [h, w, 3], with the window of source that the two axes are made for.\n"
     "level: 0 for any processor, 1 for AVX2, 2 for AVX-512; LEVEL, the best that runs here, instead of a higher one."},
    {0},
};
static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)set_up}, {0}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_resize", .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC PyInit__resize(void) { return PyModuleDef_Init(&definition); }
