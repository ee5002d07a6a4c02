// Rows of quantised numbers times rows of float32, y = x rows^T, for decoding on a CPU.
//
// A step of decoding reads every weight once, so that few bytes a weight make it fast, if decoding
// the weights takes no longer than reading them. Blocks stay as a GGUF file has them, but that the
// bytes of LANES rows stand beside each other: the first byte of each row, then the second one of
// each. A vector then holds one number of every row, no lane ever needs another one's, and all is
// written in the vector types of GCC and Clang, for any machine. Activations stay float32.
//
// Every number of y is a sum over the row in one order, whatever the number of rows of x and of
// threads: a row of x has the same bits alone and in company. A row of zeros takes no time: the
// server's free rows are such. The formats of blocks are ggml's
// (ggml-common.h of llama.cpp); tests compare them with the library `gguf`.
//
// Sizes: A rows of x, D numbers of a row, F rows of the matrix.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int LANES = 16;  // also in blocks.py
#if defined(__AVX512BW__)
constexpr int W = 16;    // of the lanes, how many a register holds
constexpr int MOST = 8;  // rows of x that are multiplied together: their sums stay in registers
#elif defined(__AVX2__) && defined(__F16C__)
constexpr int W = 8, MOST = 4;
#else
constexpr int W = 4, MOST = 4;
#endif
typedef uint8_t Bytes __attribute__((vector_size(W)));
typedef int8_t SignedBytes __attribute__((vector_size(W)));
typedef int32_t Codes __attribute__((vector_size(4 * W)));
typedef float Floats __attribute__((vector_size(4 * W)));

constexpr int SPAN = 32;            // numbers of x, whose sum blocks with an offset need
constexpr int64_t ALONE = 1 << 16;  // products of so few numbers are not worth another thread
constexpr int64_t PARTS = 8;        // of a thread's share: the last ones even out

// ---- one byte of each row

template <class Kind>
inline Kind load(const uint8_t* bytes) {
  Kind found;
  std::memcpy(&found, bytes, sizeof found);
  return found;
}

// GCC 12 widens bytes by way of memory, if it is not told how.
inline Codes codes(const uint8_t* bytes) {
#if defined(__AVX512BW__)
  return (Codes)_mm512_cvtepu8_epi32(load<__m128i>(bytes));
#elif defined(__AVX2__)
  return (Codes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
#else
  return __builtin_convertvector(load<Bytes>(bytes), Codes);
#endif
}

inline Floats floats(Codes whole) { return __builtin_convertvector(whole, Floats); }

inline Floats signed_floats(const uint8_t* bytes) {
#if defined(__AVX512BW__)
  return floats((Codes)_mm512_cvtepi8_epi32(load<__m128i>(bytes)));
#elif defined(__AVX2__)
  return floats((Codes)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)bytes)));
#else
  return floats(__builtin_convertvector(load<SignedBytes>(bytes), Codes));
#endif
}

// Numbers of 16 bits, whose upper bytes follow the lower ones.
inline Floats halves(const uint8_t* bytes) {
#if defined(__AVX512BW__)
  const __m256i low = _mm256_cvtepu8_epi16(load<__m128i>(bytes));
  const __m256i high = _mm256_cvtepu8_epi16(load<__m128i>(bytes + LANES));
  return (Floats)_mm512_cvtph_ps(_mm256_or_si256(low, _mm256_slli_epi16(high, 8)));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m128i low = _mm_loadl_epi64((const __m128i*)bytes);
  const __m128i high = _mm_loadl_epi64((const __m128i*)(bytes + LANES));
  return (Floats)_mm256_cvtph_ps(_mm_unpacklo_epi8(low, high));
#else
  Floats found;
  for (int i = 0; i < W; ++i) {
    const int bits = bytes[i] | bytes[i + LANES] << 8;
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const int whole = exponent ? fraction + 1024 : fraction;
    found[i] = std::ldexp(float(bits >> 15 ? -whole : whole), std::max(exponent, 1) - 25);
  }
  return found;
#endif
}

// ---- block formats: one block of each row times NA rows of x, added to `sum`

struct Rows {  // of x, from the block's first number on
  const float* x;
  const float* spans;  // the sums of SPAN numbers
  int64_t D;
  float span(int a, int n) const { return spans[a * (D / SPAN) + n]; }
};

template <int NA>
inline void add(Floats* sum, Floats numbers, const float* x, int64_t D) {
#pragma GCC unroll 8
  for (int a = 0; a < NA; ++a) sum[a] += numbers * x[a * D];
}

// Two numbers in each of `count` bytes; those of the upper halves stand `count` behind the others.
template <int NA>
inline void add_halves(Floats* low, Floats* high, const uint8_t* bytes, int count, const float* x,
                       int64_t D) {
  for (int i = 0; i < count; ++i) {
    const Codes both = codes(bytes + i * LANES);
    add<NA>(low, floats(both & 15), x + i, D);
    add<NA>(high, floats(both >> 4), x + count + i, D);
  }
}

struct Q4_0 {
  static constexpr int64_t kind = 2, numbers = 32, bytes = 18;
  template <int NA>
  static void add_to(Floats* sum, const uint8_t* block, Rows rows) {
    const Floats scale = halves(block);
    Floats low[NA] = {}, high[NA] = {};
    add_halves<NA>(low, high, block + 2 * LANES, 16, rows.x, rows.D);
    for (int a = 0; a < NA; ++a) sum[a] += scale * (low[a] + high[a] - 8 * rows.span(a, 0));
  }
};

struct Q4_1 {
  static constexpr int64_t kind = 3, numbers = 32, bytes = 20;
  template <int NA>
  static void add_to(Floats* sum, const uint8_t* block, Rows rows) {
    const Floats scale = halves(block), offset = halves(block + 2 * LANES);
    Floats low[NA] = {}, high[NA] = {};
    add_halves<NA>(low, high, block + 4 * LANES, 16, rows.x, rows.D);
    for (int a = 0; a < NA; ++a)
      sum[a] += scale * (low[a] + high[a]) + offset * rows.span(a, 0);
  }
};

struct Q8_0 {
  static constexpr int64_t kind = 8, numbers = 32, bytes = 34;
  template <int NA>
  static void add_to(Floats* sum, const uint8_t* block, Rows rows) {
    const Floats scale = halves(block);
    Floats even[NA] = {}, odd[NA] = {};  // two sums: one addition would wait for the other
    for (int i = 0; i < 32; i += 2) {
      add<NA>(even, signed_floats(block + (2 + i) * LANES), rows.x + i, rows.D);
      add<NA>(odd, signed_floats(block + (3 + i) * LANES), rows.x + i + 1, rows.D);
    }
    for (int a = 0; a < NA; ++a) sum[a] += scale * (even[a] + odd[a]);
  }
};

struct Q4_K {
  static constexpr int64_t kind = 12, numbers = 256, bytes = 144;
  template <int NA>
  static void add_to(Floats* sum, const uint8_t* block, Rows rows) {
    const Floats scale = halves(block), least = halves(block + 2 * LANES);
    const auto packed = [&](int i) { return codes(block + (4 + i) * LANES); };
    const auto scales = [&](int i) {  // six bits each
      return scale * floats(i < 4 ? packed(i) & 63 : (packed(i + 4) & 15) | packed(i - 4) >> 6 << 4);
    };
    const auto offsets = [&](int i) {
      return least * floats(i < 4 ? packed(i + 4) & 63 : packed(i + 4) >> 4 | packed(i) >> 6 << 4);
    };
    for (int n = 0; n < 8; n += 2) {
      Floats low[NA] = {}, high[NA] = {};
      add_halves<NA>(low, high, block + (16 + 16 * n) * LANES, 32, rows.x + 32 * n, rows.D);
      const Floats of_low = scales(n), of_high = scales(n + 1);
      const Floats below_low = offsets(n), below_high = offsets(n + 1);
      for (int a = 0; a < NA; ++a) {
        sum[a] += of_low * low[a] - below_low * rows.span(a, n);
        sum[a] += of_high * high[a] - below_high * rows.span(a, n + 1);
      }
    }
  }
};

struct Q6_K {
  static constexpr int64_t kind = 14, numbers = 256, bytes = 210;
  template <int NA>
  static void add_to(Floats* sum, const uint8_t* block, Rows rows) {
    const Floats scale = halves(block + 208 * LANES);
    for (int n = 0; n < 16; ++n) {  // 16 numbers each: four bits stand in `low`, two in `high`
      const int quarter = n % 8 / 2;
      const uint8_t* low = block + (n / 8 * 64 + quarter % 2 * 32 + n % 2 * 16) * LANES;
      const uint8_t* high = block + (128 + n / 8 * 32 + n % 2 * 16) * LANES;
      Floats part[NA] = {};
      for (int i = 0; i < 16; ++i) {
        const Codes four = codes(low + i * LANES) >> quarter / 2 * 4 & 15;
        const Codes two = codes(high + i * LANES) >> quarter * 2 & 3;
        add<NA>(part, floats((four | two << 4) - 32), rows.x + n * 16 + i, rows.D);
      }
      const Floats step = scale * signed_floats(block + (192 + n) * LANES);
      for (int a = 0; a < NA; ++a) sum[a] += step * part[a];
    }
  }
};

// ---- the product

struct Product {
  const float* x;
  const float* spans;
  const uint8_t* tiles;
  float* y;
  int64_t A, D, F;
};

template <class Format, int NA>
void multiply_lanes(const Product& p, int64_t first, int64_t a) {
  const int64_t tile_bytes = p.D / Format::numbers * Format::bytes * LANES;
  const uint8_t* block = p.tiles + first / LANES * tile_bytes + first % LANES;
  Rows rows = {p.x + a * p.D, p.spans + a * (p.D / SPAN), p.D};
  Floats sum[NA] = {};
  for (int64_t k = 0; k < p.D; k += Format::numbers, block += Format::bytes * LANES) {
    Format::template add_to<NA>(sum, block, rows);
    rows.x += Format::numbers;
    rows.spans += Format::numbers / SPAN;
  }
  for (int i = 0; i < NA; ++i)
    std::memcpy(p.y + (a + i) * p.F + first, &sum[i], sizeof sum[i]);
}

template <class Format>
void multiply_tiles(const Product& p, int64_t first, int64_t end) {
  for (int64_t f = first * LANES; f < end * LANES; f += W) {
    int64_t a = 0;
    for (; a + MOST <= p.A; a += MOST) multiply_lanes<Format, MOST>(p, f, a);
    if (MOST > 4 && a + 4 <= p.A) multiply_lanes<Format, 4>(p, f, a), a += 4;
    if (a + 2 <= p.A) multiply_lanes<Format, 2>(p, f, a), a += 2;
    if (a < p.A) multiply_lanes<Format, 1>(p, f, a);
  }
}

struct Format {
  int64_t kind, numbers, bytes;
  void (*multiply)(const Product&, int64_t, int64_t);
};

template <class F>
constexpr Format format() { return {F::kind, F::numbers, F::bytes, multiply_tiles<F>}; }

constexpr Format FORMATS[] = {format<Q4_0>(), format<Q4_1>(), format<Q8_0>(), format<Q4_K>(),
                              format<Q6_K>()};

struct Work {
  Product product;
  const Format* format;
  std::vector<float> spans;
  int64_t tiles, parts;
  std::atomic<int64_t> next{0}, done{0};

  void run() {
    // One who comes late finds nothing to do, and looks at no array: they may be gone by then.
    for (int64_t part; (part = next.fetch_add(1)) < parts; done.fetch_add(1))
      format->multiply(product, tiles * part / parts, tiles * (part + 1) / parts);
  }
};

// The rows of x that hold more than zeros, moved to the front: the others are nobody's.
struct Used {
  std::vector<int64_t> rows;
  std::vector<float> numbers;
  Used(const float* x, int64_t A, int64_t D) {
    for (int64_t a = 0; a < A; ++a)
      if (std::any_of(x + a * D, x + (a + 1) * D, [](float number) { return number != 0; })) {
        rows.push_back(a);
        numbers.insert(numbers.end(), x + a * D, x + (a + 1) * D);
      }
  }
  void spread(float* y, int64_t A, int64_t F) const {  // from the last on: none is overwritten
    for (int64_t a = A - 1, n = rows.size() - 1; a >= 0; --a)
      if (n >= 0 && rows[n] == a) std::memmove(y + a * F, y + n-- * F, F * sizeof *y);
      else std::fill_n(y + a * F, F, 0.0f);
  }
};

ffi::Error multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_AD, ffi::Buffer<ffi::U8> tiles,
                    ffi::ResultBuffer<ffi::F32> y_AF, int64_t kind) {
  const Format* format = std::find_if(std::begin(FORMATS), std::end(FORMATS),
                                      [&](const Format& known) { return known.kind == kind; });
  if (format == std::end(FORMATS)) return ffi::Error::InvalidArgument("unknown block format");
  const auto work = std::make_shared<Work>();
  const int64_t D = x_AD.dimensions()[1];
  const Used used(x_AD.typed_data(), x_AD.dimensions()[0], D);
  const float* x = used.numbers.data();
  const int64_t A = used.rows.size();
  work->tiles = tiles.dimensions()[0];
  work->format = format;
  if (D % format->numbers || tiles.dimensions()[1] != D / format->numbers * format->bytes)
    return ffi::Error::InvalidArgument("rows do not hold as many numbers as x has");
  const int64_t F = work->tiles * LANES;
  if (A == 0) used.spread(y_AF->typed_data(), x_AD.dimensions()[0], F);
  if (A == 0 || F == 0) return ffi::Error::Success();
  work->spans.resize(A * D / SPAN);
  for (size_t n = 0; n < work->spans.size(); ++n)
    for (int i = 0; i < SPAN; ++i) work->spans[n] += x[n * SPAN + i];
  work->product = {x, work->spans.data(), tiles.typed_data(), y_AF->typed_data(), A, D, F};

  int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  if (F * D * (A + 3) / 4 < ALONE) threads = 1;
  work->parts = threads == 1 ? 1 : std::min(work->tiles, PARTS * threads);
  // XLA's own threads: those of another pool would fight with them for the cores.
  for (int64_t i = 1; i < std::min(threads, work->parts); ++i) pool.Schedule([work] { work->run(); });
  work->run();
  while (work->done.load() < work->parts) std::this_thread::yield();
  used.spread(y_AF->typed_data(), x_AD.dimensions()[0], F);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxgpt_multiply, multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("kind"));
