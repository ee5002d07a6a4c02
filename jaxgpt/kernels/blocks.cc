// Rows of quantised numbers times rows of float32, y = x rows^T, for decoding on a CPU.
//
// A step of decoding reads every weight once, so that few bytes a weight make it fast, if decoding
// the weights costs no more time than reading them. Rows stay as a GGUF file has them. A tile of
// TILE rows is decoded, STRETCH numbers of each at a time, into memory that stays in the processor's
// first cache, and multiplied there by all rows of x, which stay float32.
//
// Every number of y is a sum over the row in one order, whatever the number of rows of x, of
// threads, and the tile: a row of x has the same bits alone and in company. Block formats are
// ggml's (ggml-common.h of llama.cpp); tests compare them with the library `gguf`.
//
// Sizes: A rows of x, D numbers of a row, F rows of the matrix.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

// Numbers of a vector register. A vector type of GCC and Clang is any machine's, NEON's too.
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * W), aligned(4), may_alias));

constexpr int TILE = 8;                // rows of the matrix that are decoded together
constexpr int STRETCH = 512;           // numbers of them; a multiple of every block
constexpr int STRIDE = STRETCH + 16;   // off a power of two, which would fall on the same cache lines
constexpr int GROUP = 64;              // rows of x whose sums are kept at a time
constexpr int64_t ALONE = 1 << 16;     // products of so few numbers are not worth another thread
constexpr int64_t PARTS = 8;           // of a thread's share: the last ones even out

// ---- block formats: `count` numbers from where a block begins

inline float half(const uint8_t* bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, 2);
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = std::ldexp(float(exponent ? fraction + 1024 : fraction), std::max(exponent, 1) - 25);
  return bits >> 15 ? -size : size;
#endif
}

struct Line {  // a code's number is scale * code + offset
  float scale, offset;
};

// 16 bytes hold 32 numbers: the lower halves belong to `low`, the upper ones to `high`.
inline void halves(const uint8_t* codes, Line low, Line high, float* to_low, float* to_high) {
#if defined(__AVX512F__)
  // A code picks its number out of a register with all sixteen; the pick looks at four bits only.
  const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto numbers = [&](Line line) {
    return _mm512_fmadd_ps(levels, _mm512_set1_ps(line.scale), _mm512_set1_ps(line.offset));
  };
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  _mm512_storeu_ps(to_low, _mm512_permutexvar_ps(bytes, numbers(low)));
  _mm512_storeu_ps(to_high, _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), numbers(high)));
#else
  for (int i = 0; i < 16; ++i) to_low[i] = float(codes[i] & 15) * low.scale + low.offset;
  for (int i = 0; i < 16; ++i) to_high[i] = float(codes[i] >> 4) * high.scale + high.offset;
#endif
}

void q4_0(const uint8_t* block, int64_t count, float* to) {
  for (; count > 0; count -= 32, block += 18, to += 32) {
    const float scale = half(block);
    halves(block + 2, {scale, -8 * scale}, {scale, -8 * scale}, to, to + 16);
  }
}

void q4_1(const uint8_t* block, int64_t count, float* to) {
  for (; count > 0; count -= 32, block += 20, to += 32) {
    const Line line = {half(block), half(block + 2)};
    halves(block + 4, line, line, to, to + 16);
  }
}

void q8_0(const uint8_t* block, int64_t count, float* to) {
  for (; count > 0; count -= 32, block += 34, to += 32) {
    const float scale = half(block);
    const int8_t* codes = reinterpret_cast<const int8_t*>(block + 2);
    for (int i = 0; i < 32; ++i) to[i] = scale * float(codes[i]);
  }
}

void q4_k(const uint8_t* block, int64_t count, float* to) {
  for (; count > 0; count -= 256, block += 144) {
    const float scale = half(block), least = half(block + 2);
    const uint8_t *packed = block + 4, *codes = block + 16;
    const auto line = [&](int i) -> Line {  // six bits each, of scale and offset
      if (i < 4) return {scale * float(packed[i] & 63), -least * float(packed[i + 4] & 63)};
      const int of_scale = (packed[i + 4] & 15) | packed[i - 4] >> 6 << 4;
      return {scale * float(of_scale), -least * float(packed[i + 4] >> 4 | packed[i] >> 6 << 4)};
    };
    for (int pair = 0; pair < 8; pair += 2, codes += 32, to += 64) {
      const Line low = line(pair), high = line(pair + 1);
      halves(codes, low, high, to, to + 32);
      halves(codes + 16, low, high, to + 16, to + 48);
    }
  }
}

void q6_k(const uint8_t* block, int64_t count, float* to) {
  for (; count > 0; count -= 256, block += 210) {
    const float scale = half(block + 208);
    for (int n = 0; n < 16; ++n, to += 16) {
      // Numbers 16 n to 16 n + 15: four bits of each stand in `low`, two more in `high`.
      const int quarter = n % 8 / 2;
      const uint8_t* low = block + n / 8 * 64 + quarter % 2 * 32 + n % 2 * 16;
      const uint8_t* high = block + 128 + n / 8 * 32 + n % 2 * 16;
      const float step = scale * float(int8_t(block[192 + n]));
      const int shift_low = quarter / 2 * 4, shift_high = quarter * 2;
      for (int i = 0; i < 16; ++i) {
        const int code = (low[i] >> shift_low & 15) | (high[i] >> shift_high & 3) << 4;
        to[i] = step * float(code - 32);
      }
    }
  }
}

struct Format {
  int64_t number;  // ggml's
  int64_t numbers, bytes;  // of a block
  void (*decode)(const uint8_t*, int64_t, float*);
};

constexpr Format FORMATS[] = {
    {2, 32, 18, q4_0}, {3, 32, 20, q4_1}, {8, 32, 34, q8_0}, {12, 256, 144, q4_k}, {14, 256, 210, q6_k},
};

// ---- the product

struct Product {
  const Format* format;
  const float* x;
  const uint8_t* rows;
  float* y;
  int64_t A, D, F;
};

// Adds the products of NF decoded rows and NA rows of x to their sums, W partial ones for each.
template <int NF, int NA>
inline void add(const float* w, const float* x, int64_t D, int64_t count, Vector* sums) {
  Vector sum[NA][NF];
  for (int a = 0; a < NA; ++a)
    for (int f = 0; f < NF; ++f) sum[a][f] = sums[a * TILE + f];
  for (int64_t k = 0; k < count; k += W)
#pragma GCC unroll 8
    for (int a = 0; a < NA; ++a) {
      const Vector part = *reinterpret_cast<const Vector*>(x + a * D + k);
#pragma GCC unroll 8
      for (int f = 0; f < NF; ++f)
        sum[a][f] += *reinterpret_cast<const Vector*>(w + f * STRIDE + k) * part;
    }
  for (int a = 0; a < NA; ++a)
    for (int f = 0; f < NF; ++f) sums[a * TILE + f] = sum[a][f];
}

inline float total(Vector sum) {
  for (int width = W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum[0];
}

void tile(const Product& p, int64_t first) {
  alignas(64) float w[TILE * STRIDE];
  alignas(64) Vector sums[GROUP * TILE];
  const int64_t row_bytes = p.D / p.format->numbers * p.format->bytes;
  for (int64_t start = 0; start < p.A; start += GROUP) {
    const int64_t NA = std::min<int64_t>(GROUP, p.A - start);
    std::fill(sums, sums + NA * TILE, Vector{});
    for (int64_t k = 0; k < p.D; k += STRETCH) {
      const int64_t count = std::min<int64_t>(STRETCH, p.D - k);
      for (int f = 0; f < TILE; ++f) {  // behind the last row that one again, for nobody
        const uint8_t* row = p.rows + std::min(first + f, p.F - 1) * row_bytes;
        p.format->decode(row + k / p.format->numbers * p.format->bytes, count, w + f * STRIDE);
      }
      const float* x = p.x + start * p.D + k;
      int64_t a = 0;
      for (; a + 4 <= NA; a += 4) {
        add<4, 4>(w, x + a * p.D, p.D, count, sums + a * TILE);
        add<4, 4>(w + 4 * STRIDE, x + a * p.D, p.D, count, sums + a * TILE + 4);
      }
      for (; a < NA; ++a) add<TILE, 1>(w, x + a * p.D, p.D, count, sums + a * TILE);
    }
    for (int64_t a = 0; a < NA; ++a)
      for (int64_t f = 0; f < std::min<int64_t>(TILE, p.F - first); ++f)
        p.y[(start + a) * p.F + first + f] = total(sums[a * TILE + f]);
  }
}

struct Work {
  Product product;
  int64_t tiles, parts;
  std::atomic<int64_t> next{0}, done{0};

  void run() {
    // One who comes late finds nothing to do, and looks at no array: they may be gone by then.
    for (int64_t part; (part = next.fetch_add(1)) < parts; done.fetch_add(1))
      for (int64_t i = tiles * part / parts; i < tiles * (part + 1) / parts; ++i)
        tile(product, i * TILE);
  }
};

ffi::Error multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_AD, ffi::Buffer<ffi::U8> rows_FC,
                    ffi::ResultBuffer<ffi::F32> y_AF, int64_t kind) {
  const Format* format = std::find_if(std::begin(FORMATS), std::end(FORMATS),
                                      [&](const Format& known) { return known.number == kind; });
  if (format == std::end(FORMATS)) return ffi::Error::InvalidArgument("unknown block format");
  const auto x = x_AD.dimensions(), rows = rows_FC.dimensions();
  const Product product = {format, x_AD.typed_data(), rows_FC.typed_data(), y_AF->typed_data(),
                           x[0], x[1], rows[0]};
  if (product.D % format->numbers || rows[1] != product.D / format->numbers * format->bytes)
    return ffi::Error::InvalidArgument("rows do not hold as many numbers as x has");
  if (product.A == 0 || product.F == 0) return ffi::Error::Success();

  const auto work = std::make_shared<Work>();
  work->product = product;
  work->tiles = (product.F + TILE - 1) / TILE;
  int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  if (product.F * product.D * (product.A + 3) / 4 < ALONE) threads = 1;
  work->parts = threads == 1 ? 1 : std::min(work->tiles, PARTS * threads);
  // XLA's own threads: those of another pool would fight with them for the cores.
  for (int64_t i = 1; i < std::min(threads, work->parts); ++i) pool.Schedule([work] { work->run(); });
  work->run();
  while (work->done.load() < work->parts) std::this_thread::yield();
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
