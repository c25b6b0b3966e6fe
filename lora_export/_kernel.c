/* The inner loop of a merge: rows of a weight, plus left x right, rounded to the weight's dtype.
 *
 * It computes in a format wider than the weight's (float32 for bfloat16 and float16, float64 for
 * float32). Elements whose rounding float32 cannot decide are computed again in float64, and what
 * is still open is listed. `arithmetic.py` settles those, so nothing here has to be exact: only the
 * bounds have to hold.
 *
 * An element is undecided when rounding x - e and x + e differs, where e is `slack` of its row
 * (the bound on the error of the sum of products) and the error of adding the weight. Rounding is
 * monotone, so where both agree every value between rounds to the same.
 *
 * Vectors are those of GCC and Clang. Other compilers fail here, and arithmetic.py goes by numpy.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif

enum {
    ROWS = 8, VECTORS = 2, /* of a tile: its sums fill half of AVX-512's registers */
    PANEL = 512, /* columns of `right` that stay in the L1 cache */
    TERMS = 8, /* of a partial sum: sums of sums lose less; arithmetic.py counts on it */
};

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));

/* Every format below has three macros: read a vector, the bits of a rounded one, and the largest
 * number that is still finite. Ties may round either way: a tie is always undecided. */

#define READ_BF16(at) \
    ({ u16x16 h; memcpy(&h, at, 32); (f32x16)(__builtin_convertvector(h, u32x16) << 16); })
#define BITS_BF16(x) (((u32x16)(x) + 0x8000u) >> 16)
#define MOST_BF16 0x1.fep127f

/* float16 without instructions of its own, and without denormals of float32: a process may have
 * switched those off. */
#define READ_F16(at) \
    ({ u16x16 h; memcpy(&h, at, 32); \
       u32x16 u = __builtin_convertvector(h, u32x16), m = (u & 0x7fffu) << 13; \
       u32x16 small = (u32x16)(m < 0x00800000u), special = (u32x16)(m >= 0x0f800000u); \
       u32x16 normal = (m + 0x38000000u) | (special & 0x7f800000u); \
       u32x16 denormal = (u32x16)((f32x16)(m + 0x38800000u) - 0x1p-14f); \
       (f32x16)((normal & ~small) | (denormal & small) | ((u & 0x8000u) << 16)); })
#define BITS_F16(x) \
    ({ u32x16 b = (u32x16)(x), sign = (b >> 16) & 0x8000u; \
       b &= 0x7fffffffu; \
       u32x16 normal = (b - 0x37fff000u) >> 13; \
       u32x16 denormal = (u32x16)((f32x16)b + 0.5f) - 0x3f000000u; \
       u32x16 small = (u32x16)((f32x16)b < 0x1p-14f); \
       (normal & ~small) | (denormal & small) | sign; })
#define MOST_F16 65504.0f

#define READ_F32(at) ({ f32x8 f; memcpy(&f, at, 32); __builtin_convertvector(f, f64x8); })
#define BITS_F32(x) \
    __builtin_convertvector((u32x8)__builtin_convertvector(x, f32x8), u64x8)
#define MOST_F32 0x1.fffffep127

/* Undecided elements while they are collected; `merge` numbers them as its caller does. */
#define AT(row, column) ((row) << 32 | (column))
#define ROW(at) ((at) >> 32)
#define COLUMN(at) ((at) & 0xffffffff)

#define HAS_ANY(bits) \
    ({ uint64_t w[8]; memcpy(w, &(bits), 64); \
       (w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7]) != 0; })

/* weight, out: `rows` rows of `stride` elements, of which `cols` from the given pointers on;
 * left (rows, rank), right (rank, cols), slack (rows). Needs rows >= ROWS and
 * cols >= VECTORS * lanes. Returns how many elements are undecided; the first `capacity` of them
 * are listed as AT(row, column), some of them twice. */
#define KERNEL(NAME, STORED, STOREDV, WIDE, WIDEV, BITSV, LANES, READ, BITS, MOST, ULPS) \
    /* sum = left x right for one tile. A function of its own, so that the compiler keeps the \
     * partial sums in registers. */ \
    CLONES __attribute__((noinline)) static void NAME##_tile( \
        const WIDE *restrict left, const WIDE *restrict right, int64_t rank, \
        WIDEV sum[restrict ROWS][VECTORS]) \
    { \
        for (int i = 0; i < ROWS; i++) \
            for (int v = 0; v < VECTORS; v++) sum[i][v] = (WIDEV){0}; \
        for (int64_t start = 0; start < rank; start += TERMS) { \
            int64_t stop = start + TERMS < rank ? start + TERMS : rank; \
            WIDEV part[ROWS][VECTORS]; \
            for (int i = 0; i < ROWS; i++) \
                for (int v = 0; v < VECTORS; v++) part[i][v] = (WIDEV){0}; \
            for (int64_t k = start; k < stop; k++) { \
                WIDEV a[VECTORS]; \
                for (int v = 0; v < VECTORS; v++) \
                    memcpy(&a[v], right + (k * VECTORS + v) * LANES, sizeof a[v]); \
                for (int i = 0; i < ROWS; i++) \
                    for (int v = 0; v < VECTORS; v++) part[i][v] += a[v] * left[i * rank + k]; \
            } \
            for (int i = 0; i < ROWS; i++) \
                for (int v = 0; v < VECTORS; v++) sum[i][v] += part[i][v]; \
        } \
    } \
    CLONES static int64_t NAME( \
        const STORED *restrict weight, STORED *restrict out, int64_t stride, int64_t rows, \
        int64_t cols, const WIDE *restrict left, const WIDE *restrict right, int64_t rank, \
        const WIDE *restrict slack, WIDE *restrict packed, int64_t *restrict undecided, \
        int64_t capacity) \
    { \
        const int64_t width = VECTORS * LANES; \
        int64_t count = 0; \
        for (int64_t panel = 0; panel < cols; panel += PANEL) { \
        const int64_t end = panel + PANEL < cols ? panel + PANEL : cols; \
        /* The columns of a tile, rows one after the other: rows of `right` itself lie a power of \
         * two apart, and would push each other out of the cache. */ \
        for (int64_t tile = panel; tile < end; tile += width) { \
            int64_t c = tile + width > cols ? cols - width : tile; \
            for (int64_t k = 0; k < rank; k++) \
                memcpy(packed + (tile - panel) * rank + k * width, right + k * cols + c, \
                       width * sizeof *right); \
        } \
        for (int64_t block = 0; block < rows; block += ROWS) \
        for (int64_t tile = panel; tile < end; tile += width) { \
            /* the last tile of a row or column is moved back to be whole */ \
            int64_t r = block + ROWS > rows ? rows - ROWS : block; \
            int64_t c = tile + width > cols ? cols - width : tile; \
            WIDEV sum[ROWS][VECTORS]; \
            NAME##_tile(left + r * rank, packed + (tile - panel) * rank, rank, sum); \
            BITSV open[ROWS][VECTORS], of_row[ROWS], any = (BITSV){0}; \
            for (int i = 0; i < ROWS; i++) { \
                of_row[i] = (BITSV){0}; \
                for (int v = 0; v < VECTORS; v++) { \
                    int64_t at = (r + i) * stride + c + v * LANES; \
                    WIDEV x = sum[i][v] + READ(weight + at); \
                    WIDEV size = (WIDEV)((BITSV)x & (~(BITSV){0} >> 1)); \
                    WIDEV e = size * (WIDE)(ULPS) + slack[r + i]; \
                    BITSV high = BITS(x + e); /* what x rounds to, where both ends agree */ \
                    STOREDV stored = __builtin_convertvector(high, STOREDV); \
                    memcpy(out + at, &stored, sizeof stored); \
                    open[i][v] = (high ^ BITS(x - e)) | (BITSV)~(size < MOST); \
                    of_row[i] |= open[i][v]; \
                } \
                any |= of_row[i]; \
            } \
            if (__builtin_expect(!HAS_ANY(any), 1)) continue; \
            for (int i = 0; i < ROWS; i++) { \
                if (!HAS_ANY(of_row[i])) continue; \
                for (int v = 0; v < VECTORS; v++) \
                    for (int j = 0; j < LANES; j++) { \
                        if (!open[i][v][j]) continue; \
                        if (count < capacity) undecided[count] = AT(r + i, c + v * LANES + j); \
                        count++; \
                    } \
            } \
        } \
        } \
        return count; \
    }

KERNEL(merge_bf16, uint16_t, u16x16, float, f32x16, u32x16, 16, READ_BF16, BITS_BF16, MOST_BF16, 0x1.4p-23f)
KERNEL(merge_f16, uint16_t, u16x16, float, f32x16, u32x16, 16, READ_F16, BITS_F16, MOST_F16, 0x1.4p-23f)
KERNEL(merge_f32, uint32_t, u32x8, double, f64x8, u64x8, 8, READ_F32, BITS_F32, MOST_F32, 0x1.4p-52)

/* The same for a single element. */
static uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
static float float_of(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

static double read_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }
static uint32_t round_bf16(float x) { return (bits_of(x) + 0x8000u) >> 16; }

static double read_f16(uint16_t h)
{
    uint32_t m = (h & 0x7fffu) << 13;
    float size = float_of((m + 0x38000000u) | (m < 0x0f800000u ? 0 : 0x7f800000u));
    if (m < 0x00800000u) size = float_of(m + 0x38800000u) - 0x1p-14f;
    return h & 0x8000u ? -size : size;
}

static uint32_t round_f16(float x)
{
    uint32_t b = bits_of(x) & 0x7fffffffu, sign = (bits_of(x) >> 16) & 0x8000u;
    if (float_of(b) < 0x1p-14f) return (bits_of(float_of(b) + 0.5f) - 0x3f000000u) | sign;
    return ((b - 0x37fff000u) >> 13) | sign;
}

/* float64 to float32, rounded to odd: rounding that again is rounding once. See rounding.py. */
static float to_odd(double x)
{
    float near = (float)x;
    double past = x < 0 ? x - near : near - x; /* above 0 where `near` is farther from zero */
    if (past == 0 || bits_of(near) & 1) return near;
    return float_of(bits_of(near) + (past > 0 ? -1 : 1));
}

CLONES static double inner_product(const double *a, const double *b, int64_t rank)
{
    f64x8 sums = {0};
    double sum = 0;
    int64_t k = 0;
    for (; k + 8 <= rank; k += 8) {
        f64x8 left, right;
        memcpy(&left, a + k, sizeof left);
        memcpy(&right, b + k, sizeof right);
        sums += left * right;
    }
    for (; k < rank; k++) sum += a[k] * b[k];
    for (int i = 0; i < 8; i++) sum += sums[i];
    return sum;
}

/* Compute the undecided elements again in float64; return how many stay open, and move them to the
 * front. left (rows, rank) and right, transposed (cols, rank), do not have the scale in them.
 *
 * 2^22 times the slack of a row is more than the magnitudes of a sum's terms add up to. */
#define SETTLE(NAME, READ, ROUND, MOST) \
    static int64_t NAME( \
        const uint16_t *weight, uint16_t *out, int64_t stride, const double *left, \
        const double *right, int64_t rank, double scale, const float *slack, int64_t *undecided, \
        int64_t count) \
    { \
        int64_t open = 0; \
        for (int64_t n = 0; n < count; n++) { \
            int64_t row = ROW(undecided[n]), column = COLUMN(undecided[n]); \
            int64_t at = row * stride + column; \
            double sum = inner_product(left + row * rank, right + column * rank, rank); \
            double x = READ(weight[at]) + scale * sum, size = x < 0 ? -x : x; \
            double e = slack[row] * 0x1p-30 * (rank + 4) + size * 0x1p-51; \
            uint32_t low = ROUND(to_odd(x - e)), high = ROUND(to_odd(x + e)); \
            if (low == high && size < MOST) \
                out[at] = (uint16_t)low; \
            else \
                undecided[open++] = undecided[n]; \
        } \
        return open; \
    }

SETTLE(settle_bf16, read_bf16, round_bf16, MOST_BF16)
SETTLE(settle_f16, read_f16, round_f16, MOST_F16)

static PyObject *merge(PyObject *self, PyObject *args)
{
    const char *dtype;
    Py_buffer weight, out, left, right, slack, exact_left, exact_right, undecided;
    Py_ssize_t stride, first, rows, cols, rank;
    double scale;
    if (!PyArg_ParseTuple(args, "sy*w*nnnnny*y*y*y*y*dw*", &dtype, &weight, &out, &stride, &first,
                          &rows, &cols, &rank, &left, &right, &slack, &exact_left, &exact_right,
                          &scale, &undecided))
        return NULL;
    int64_t stored = strcmp(dtype, "F32") ? 2 : 4, wide = 2 * stored, count = -1;
    int64_t most = 1 << 30; /* products of two sizes, in bytes, do not overflow */
    int known = !strcmp(dtype, "BF16") || !strcmp(dtype, "F16") || stored == 4;
    if (!known || first < 0 || rows < 0 || cols < 0 || rank < 0 || first > stride - cols
        || rows >= most || stride >= most || rank >= most
        || weight.len != rows * stride * stored || out.len != weight.len
        || left.len != rows * rank * wide || right.len != rank * cols * wide
        || slack.len != rows * wide || exact_left.len != rows * rank * 8
        || exact_right.len != rank * cols * 8 || undecided.len % 8) {
        PyErr_SetString(PyExc_ValueError, "the buffers do not fit the sizes");
    } else if (rows < ROWS || cols * wide < VECTORS * 64) {
        count = -2; /* too small for a tile */
    } else {
        const char *w = (const char *)weight.buf + first * stored;
        char *o = (char *)out.buf + first * stored;
        int64_t capacity = undecided.len / 8;
        void *packed = PyMem_Malloc((size_t)PANEL * (rank ? rank : 1) * wide);
        if (packed == NULL) {
            PyErr_NoMemory();
            goto done;
        }
        Py_BEGIN_ALLOW_THREADS
#define CALL(NAME, S, W) \
    NAME((const S *)w, (S *)o, stride, rows, cols, (const W *)left.buf, (const W *)right.buf, \
         rank, (const W *)slack.buf, (W *)packed, (int64_t *)undecided.buf, capacity)
#define SETTLED(NAME) \
    NAME((const uint16_t *)w, (uint16_t *)o, stride, (const double *)exact_left.buf, \
         (const double *)exact_right.buf, rank, scale, (const float *)slack.buf, \
         (int64_t *)undecided.buf, count)
        int is_f16 = !strcmp(dtype, "F16");
        if (stored == 4)
            count = CALL(merge_f32, uint32_t, double);
        else
            count = is_f16 ? CALL(merge_f16, uint16_t, float) : CALL(merge_bf16, uint16_t, float);
        if (stored == 2 && count <= capacity)
            count = is_f16 ? SETTLED(settle_f16) : SETTLED(settle_bf16);
        for (int64_t *at = undecided.buf, n = 0; n < count && n < capacity; n++)
            at[n] = ROW(at[n]) * cols + COLUMN(at[n]);
        Py_END_ALLOW_THREADS
        PyMem_Free(packed);
    }
done:
    PyBuffer_Release(&weight);
    PyBuffer_Release(&out);
    PyBuffer_Release(&left);
    PyBuffer_Release(&right);
    PyBuffer_Release(&slack);
    PyBuffer_Release(&exact_left);
    PyBuffer_Release(&exact_right);
    PyBuffer_Release(&undecided);
    return count == -1 ? NULL : PyLong_FromLongLong(count);
}

static PyMethodDef methods[] = {
    {"merge", merge, METH_VARARGS,
     "merge(dtype, weight, out, stride, first, rows, cols, rank, left, right, slack,\n"
     "      exact_left, exact_right, scale, undecided)\n"
     "Write weight + left @ right, rounded, to columns first to first + cols of `out`; return how\n"
     "many elements are undecided, or -2 where the region is too small for a tile.\n"
     "weight, out: bytes of rows of `stride` elements. left (rows, rank), with the scale in it,\n"
     "right (rank, cols) and slack (rows): float32, or float64 for F32. exact_left (rows, rank)\n"
     "and exact_right (cols, rank): float64. undecided: int64, as many as may be listed."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_kernel", "See arithmetic.py.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModule_Create(&module); }
