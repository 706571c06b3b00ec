// Python bindings: shapes and layouts are checked here under the GIL, then the plain C++ runs
// without it. Python allocates every output. No linking against torch: tensors arrive through
// DLPack.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>

#include "attention.h"
#include "few_rows.h"
#include "ghost.h"
#include "heads.h"
#include "patchify.h"
#include "resize.h"
#include "rms_norm.h"
#include "rotate.h"
#include "sample.h"
#include "swiglu.h"
#include "token_logprob.h"
#include "warp.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Cpu = nb::device::cpu;
using Source = nb::ndarray<const uint8_t, nb::shape<-1, -1, 3>, nb::c_contig, Cpu>;
using Target = nb::ndarray<uint8_t, nb::shape<-1, -1, 3>, nb::c_contig, Cpu>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, Cpu>;
using Longs = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, Cpu>;
using Boxes = nb::ndarray<const int64_t, nb::shape<-1, 4>, nb::c_contig, Cpu>;
using Matrices = nb::ndarray<const double, nb::shape<-1, 3, 3>, nb::c_contig, Cpu>;
using Weights = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, Cpu>;
using AnyMatrix = nb::ndarray<Cpu, nb::ndim<2>>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, Cpu>;
using Temperatures = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, Cpu>;
using Ids = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, Cpu>;

void require(bool holds, const char* what) {
    if (!holds) throw nb::value_error(what);
}

// The kernels count the pixels of a side in 32 bits, three bytes each.
constexpr int64_t kMostSide = 1 << 24;

template <class Image>
int extent(const Image& image, int axis) {
    const std::size_t size = image.shape(axis);
    require(size >= 1 && size < kMostSide, "an image without pixels, or too large");
    return static_cast<int>(size);
}

void require_same_shapes(const std::vector<Source>& sources, const std::vector<Target>& outs) {
    require(sources.size() == outs.size(), "one output per image");
    for (std::size_t i = 0; i < sources.size(); ++i)
        require(sources[i].shape(0) == outs[i].shape(0) && sources[i].shape(1) == outs[i].shape(1),
                "an output's size is not its image's");
}

// Warps count the pixels of an image and its border in 32 bits.
void require_warpable(int64_t height, int64_t width) {
    require((height + 3) * (width + 3) < int64_t{1} << 31, "an image too large to warp");
}

std::vector<double> to_vector(const Doubles& values) {
    return {values.data(), values.data() + values.shape(0)};
}

using Kernel = std::tuple<int, Doubles, Doubles>;  // radius, frequencies, amplitudes

std::vector<vise::Cosines> to_cosines(const std::vector<Kernel>& kernels) {
    std::vector<vise::Cosines> cosines;
    for (const auto& [radius, frequency, amplitude] : kernels) {
        require(radius >= 0 && radius < kMostSide, "a kernel's radius is out of bounds");
        require(frequency.shape(0) > 0 && frequency.shape(0) == amplitude.shape(0),
                "a kernel's frequencies and amplitudes differ in number");
        cosines.push_back({radius, to_vector(frequency), to_vector(amplitude)});
    }
    return cosines;
}

vise::Ghosting to_ghosting(const std::string& method) {
    if (method == "mean") return vise::Ghosting::kMean;
    if (method == "pixelate") return vise::Ghosting::kPixelate;
    require(method == "blur", "unknown method");
    return vise::Ghosting::kBlur;
}

// x1, y1, x2, y2, half-open.
void set_box(vise::GhostJob& job, const int64_t* box) {
    const bool inside = box[0] >= 0 && box[1] >= 0 && box[2] <= job.width && box[3] <= job.height;
    require(inside && box[0] <= box[2] && box[1] <= box[3], "a box is not within its image");
    job.x1 = static_cast<int>(box[0]);
    job.y1 = static_cast<int>(box[1]);
    job.x2 = static_cast<int>(box[2]);
    job.y2 = static_cast<int>(box[3]);
}

void ghost(std::vector<Source> sources, std::vector<Target> outs, Boxes boxes, std::string method,
           std::vector<Kernel> kernels, Longs kernel_of, Longs cells, float feather, bool outside,
           int threads) {
    const std::vector<vise::Cosines> cosines = to_cosines(kernels);
    const vise::Ghosting ghosting = to_ghosting(method);
    const std::size_t count = sources.size();
    require_same_shapes(sources, outs);
    require(boxes.shape(0) == count && kernel_of.shape(0) == count && cells.shape(0) == count,
            "one box, kernel and cell per image");
    std::vector<vise::GhostJob> jobs;
    for (std::size_t i = 0; i < count; ++i) {
        const int64_t kernel = kernel_of.data()[i], cell = cells.data()[i];
        require(kernel >= 0 && kernel < static_cast<int64_t>(cosines.size()), "no such kernel");
        require(cell >= 1 && cell < kMostSide, "a cell is empty or too large");
        vise::GhostJob job{};
        job.source = sources[i].data();
        job.out = outs[i].data();
        job.height = extent(sources[i], 0);
        job.width = extent(sources[i], 1);
        set_box(job, boxes.data() + 4 * i);
        job.cell = static_cast<int>(cell);
        job.kernel = &cosines[kernel];
        jobs.push_back(job);
    }
    nb::gil_scoped_release release;
    vise::ghost(jobs, ghosting, feather, outside, threads);
}

void warp(std::vector<Source> sources, std::vector<Target> outs, Matrices inverses, float fill,
          int threads) {
    require_same_shapes(sources, outs);
    require(inverses.shape(0) == sources.size(), "one matrix per image");
    require(fill >= 0 && fill <= 255, "fill is not a grey level");
    std::vector<vise::WarpJob> jobs(sources.size());
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        const int height = extent(sources[i], 0), width = extent(sources[i], 1);
        require_warpable(height, width);
        jobs[i] = {sources[i].data(), outs[i].data(), height, width, {}};
        std::copy_n(inverses.data() + 9 * i, 9, jobs[i].inverse);
    }
    nb::gil_scoped_release release;
    vise::warp(jobs, fill, threads);
}

using AxisArrays = std::tuple<Longs, Weights>;  // first input of each output, weights

vise::Axis to_axis(const AxisArrays& arrays, std::size_t inputs, std::size_t outputs) {
    const auto& [first, weight] = arrays;
    require(first.shape(0) == outputs && weight.shape(0) == outputs,
            "an axis does not fit its output");
    const int64_t width = weight.shape(1), last = static_cast<int64_t>(inputs) - width;
    for (std::size_t i = 0; i < outputs; ++i)
        require(first.data()[i] >= 0 && first.data()[i] <= last, "an axis reads beyond its input");
    return {static_cast<int>(width), first.data(), weight.data()};
}

void resize(std::vector<Source> sources, std::vector<Target> outs, std::vector<AxisArrays> across,
            std::vector<AxisArrays> down, std::vector<bool> down_first, int threads) {
    const std::size_t count = sources.size();
    require(outs.size() == count && across.size() == count && down.size() == count &&
                down_first.size() == count,
            "one output, two axes and their order per image");
    std::vector<vise::ResizeJob> jobs;
    for (std::size_t i = 0; i < count; ++i) {
        const Source& in = sources[i];
        const Target& out = outs[i];
        jobs.push_back({in.data(), out.data(), extent(in, 0), extent(in, 1), extent(out, 0),
                        extent(out, 1), to_axis(across[i], in.shape(1), out.shape(1)),
                        to_axis(down[i], in.shape(0), out.shape(0)), down_first[i]});
    }
    nb::gil_scoped_release release;
    vise::resize(jobs, threads);
}

void patchify(std::vector<Source> sources, AnyMatrix out, AnyMatrix table, int patch, int merge,
              int taps, int threads, std::optional<Matrices> inverses, float fill) {
    const int bytes = static_cast<int>(table.itemsize());
    require((bytes == 2 || bytes == 4) && out.dtype() == table.dtype(),
            "values of 2 or 4 bytes, the table's like the output's");
    require(table.shape(0) == 3 && table.shape(1) == 256 && table.stride(1) == 1 &&
                table.stride(0) == 256,
            "the table is (3, 256)");
    require(patch >= 1 && merge >= 1 && taps >= 1, "patch, merge and taps are at least 1");
    const int64_t side = static_cast<int64_t>(patch) * merge;
    const std::size_t row = static_cast<std::size_t>(3) * taps * patch * patch;
    require(out.shape(1) == row && out.stride(1) == 1 && out.stride(0) == static_cast<int64_t>(row),
            "an output row holds one patch");
    require(!inverses || inverses->shape(0) == sources.size(), "one matrix per image");
    std::vector<vise::PatchJob> jobs;
    std::size_t done = 0;
    for (const Source& image : sources) {
        const int height = extent(image, 0), width = extent(image, 1);
        require(height % side == 0 && width % side == 0,
                "an image is not a whole number of merged patches");
        if (inverses) require_warpable(height, width);
        const double* inverse = inverses ? inverses->data() + 9 * jobs.size() : nullptr;
        jobs.push_back({image.data(), static_cast<char*>(out.data()) + done * row * bytes, height,
                        width, inverse});
        done += static_cast<std::size_t>(height / patch) * (width / patch);
    }
    require(done == out.shape(0), "the output has not as many rows as there are patches");
    nb::gil_scoped_release release;
    vise::patchify(jobs, table.data(), bytes, patch, merge, taps, fill, threads);
}

vise::Logits to_logits(const AnyMatrix& matrix) {
    if (matrix.dtype() == nb::dtype<float>()) return vise::Logits::float32;
    require(matrix.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) &&
                matrix.dtype().bits == 16,
            "logits are float32 or bfloat16");
    return vise::Logits::bfloat16;
}

// Every vector has one entry per row, every id is a column, and columns lie side by side.
template <class... Rows>
void require_rows(const AnyMatrix& logits, const Longs& ids, const Rows&... rows) {
    const std::size_t count = logits.shape(0);
    require(logits.shape(1) >= 1 && logits.stride(1) == 1,
            "columns of logits must lie side by side");
    require(ids.shape(0) == count && ((rows.shape(0) == count) && ...),
            "one entry per row of logits");
    const int64_t columns = static_cast<int64_t>(logits.shape(1));
    for (std::size_t i = 0; i < count; ++i)
        require(ids.data()[i] >= 0 && ids.data()[i] < columns, "an id is not a column of logits");
}

void token_logprob_forward(AnyMatrix logits, Longs ids, Floats logprob, Floats logsumexp,
                           Floats entropy, int threads) {
    require_rows(logits, ids, logprob, logsumexp, entropy);
    const vise::Logits type = to_logits(logits);
    nb::gil_scoped_release release;
    vise::token_logprob_forward(logits.data(), type, logits.shape(0), logits.shape(1),
                                logits.stride(0), ids.data(), logprob.data(), logsumexp.data(),
                                entropy.data(), threads);
}

void token_logprob_backward(AnyMatrix logits, Longs ids, Floats logsumexp, Floats entropy,
                            Floats grad_logprob, Floats grad_logsumexp, Floats grad_entropy,
                            AnyMatrix grad, int threads) {
    require_rows(logits, ids, logsumexp, entropy, grad_logprob, grad_logsumexp, grad_entropy);
    const vise::Logits type = to_logits(logits);
    const int64_t columns = static_cast<int64_t>(logits.shape(1));
    const bool fits = grad.dtype() == logits.dtype() && grad.shape(0) == logits.shape(0) &&
                      grad.shape(1) == logits.shape(1);
    require(fits && grad.stride(1) == 1 && (grad.shape(0) <= 1 || grad.stride(0) == columns),
            "grad is contiguous, of the logits' shape and type");
    nb::gil_scoped_release release;
    vise::token_logprob_backward(logits.data(), type, logits.shape(0), columns, logits.stride(0),
                                 ids.data(), logsumexp.data(), entropy.data(), grad_logprob.data(),
                                 grad_logsumexp.data(), grad_entropy.data(), grad.data(), threads);
}

// Ids drawn from float32 logits (minus infinity: banned), and what token_logprob_forward says of
// them.
void sample(Weights logits, Temperatures temperature, Longs seed, Longs position, Ids ids,
            Floats logprob, Floats logsumexp, Floats entropy, int threads) {
    const std::size_t rows = logits.shape(0);
    const std::int64_t columns = static_cast<std::int64_t>(logits.shape(1));
    require(columns >= 1, "no ids to draw from");
    const bool fits = temperature.shape(0) == rows && seed.shape(0) == rows &&
                      position.shape(0) == rows && ids.shape(0) == rows;
    const bool results =
        logprob.shape(0) == rows && logsumexp.shape(0) == rows && entropy.shape(0) == rows;
    require(fits && results, "one entry per row of logits");
    nb::gil_scoped_release release;
    vise::sample(logits.data(), rows, columns, columns, temperature.data(), seed.data(),
                 position.data(), ids.data(), threads);
    vise::token_logprob_forward(logits.data(), vise::Logits::float32, rows, columns, columns,
                                ids.data(), logprob.data(), logsumexp.data(), entropy.data(),
                                threads);
}

// From here on addresses, not arrays: of the microseconds that a call takes, importing the tensors
// would be most. The op files check what they are.
using Address = std::uintptr_t;

const float* floats(Address address) { return reinterpret_cast<const float*>(address); }
float* result(Address address) { return reinterpret_cast<float*>(address); }

void few_rows(Address x, std::int64_t rows, std::int64_t width, Address weight, std::int64_t outs,
              Address bias, Address low, std::int64_t rank, Address up, Address y) {
    nb::gil_scoped_release release;
    vise::few_rows(floats(x), rows, width, floats(weight), outs, floats(bias), floats(low), rank,
                   floats(up), result(y));
}

const void* anything(Address address) { return reinterpret_cast<const void*>(address); }
void* some_result(Address address) { return reinterpret_cast<void*>(address); }

void rms_norm(Address x, Address weight, std::int64_t rows, std::int64_t width, float eps,
              Address z, bool brain, int threads) {
    nb::gil_scoped_release release;
    vise::rms_norm(anything(x), anything(weight), rows, width, eps, some_result(z), brain, threads);
}

void rms_norm_backward(Address x, Address weight, Address dz, std::int64_t rows, std::int64_t width,
                       float eps, Address dx, bool brain, int threads) {
    nb::gil_scoped_release release;
    vise::rms_norm_backward(anything(x), anything(weight), anything(dz), rows, width, eps,
                            some_result(dx), brain, threads);
}

void rotate(Address x, std::vector<std::int64_t> sizes, Address cos, Address sin, Address out,
            bool brain, int threads) {
    require(sizes.size() == 5, "rows, heads, half, strides of rows and heads");
    const vise::Rotation rotation{anything(x), sizes[0],    sizes[1],    sizes[2], sizes[3],
                                  sizes[4],    floats(cos), floats(sin), brain};
    nb::gil_scoped_release release;
    vise::rotate(rotation, some_result(out), threads);
}

void swiglu(Address x, std::int64_t rows, std::int64_t width, Address z, bool brain, int threads) {
    nb::gil_scoped_release release;
    vise::swiglu(anything(x), rows, width, some_result(z), brain, threads);
}

void swiglu_backward(Address x, Address dz, std::int64_t rows, std::int64_t width, Address dx,
                     bool brain, int threads) {
    nb::gil_scoped_release release;
    vise::swiglu_backward(anything(x), anything(dz), rows, width, some_result(dx), brain, threads);
}

vise::Heads to_heads(const std::vector<std::int64_t>& sizes, const std::vector<Address>& tables,
                     float eps, bool brain) {
    require(sizes.size() == 4 && tables.size() == 4, "four sizes, four tables");
    require(sizes[1] >= 0 && sizes[2] >= 1 && sizes[3] >= 1, "heads without numbers");
    vise::Heads heads{};
    heads.rows = sizes[0];
    heads.queries = sizes[1];
    heads.keys = sizes[2];
    heads.half = sizes[3];
    heads.q_weight = anything(tables[0]);
    heads.k_weight = anything(tables[1]);
    heads.cos = floats(tables[2]);
    heads.sin = floats(tables[3]);
    heads.eps = eps;
    heads.brain = brain;
    return heads;
}

void heads(std::vector<std::int64_t> sizes, std::vector<Address> tables, float eps, Address qkv,
           Address q, Address k, bool brain, int threads) {
    const vise::Heads heads = to_heads(sizes, tables, eps, brain);
    nb::gil_scoped_release release;
    vise::heads(heads, anything(qkv), some_result(q), some_result(k), threads);
}

void heads_backward(std::vector<std::int64_t> sizes, std::vector<Address> tables, float eps,
                    Address qkv, Address dq, Address dk, Address dv, Address dqkv, bool brain,
                    int threads) {
    const vise::Heads heads = to_heads(sizes, tables, eps, brain);
    nb::gil_scoped_release release;
    vise::heads_backward(heads, anything(qkv), anything(dq), anything(dk), anything(dv),
                         some_result(dqkv), threads);
}

// A bank: addresses of keys, values, owner and length; tokens, strides of keys, strides of values
// (entry, head, token), entries.
using BankNumbers = std::tuple<Address, Address, Address, Address, std::vector<std::int64_t>>;

void attention(Address q, const std::vector<std::int64_t>& sizes, float scale,
               const std::vector<BankNumbers>& numbers, bool causal, Address out, Address lse,
               int threads) {
    require(sizes.size() == 5 && sizes[3] >= 1, "five sizes, at least one key head");
    const auto longs = [](Address address) {
        return reinterpret_cast<const std::int64_t*>(address);
    };
    std::vector<vise::Bank> banks;
    for (const auto& [keys, values, owner, length, n] : numbers) {
        require(n.size() == 8, "eight numbers of a bank");
        const std::int64_t* owners = longs(owner);
        for (std::int64_t row = 0; owners && row < sizes[0]; ++row)
            require(owners[row] >= 0 && owners[row] < n[7], "a row's entry is not in its bank");
        banks.push_back({floats(keys), floats(values), n[0], n[1], n[2], n[3], n[4], n[5], n[6],
                         owners, longs(length), causal && banks.size() + 1 == numbers.size()});
    }
    const vise::Attention task{floats(q), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], scale};
    require(task.dim % vise::kDimStep == 0 && task.heads % task.kv_heads == 0,
            "sizes that the kernel does not take");
    nb::gil_scoped_release release;
    vise::attention(task, banks, result(out), result(lse), threads);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "CPU kernels of vise_kernels. Called by the op files, which allocate and document.";
    m.def("ghost", &ghost, "sources"_a.noconvert(), "outs"_a.noconvert(), "boxes"_a.noconvert(),
          "method"_a, "kernels"_a.noconvert(), "kernel_of"_a.noconvert(), "cells"_a.noconvert(),
          "feather"_a, "outside"_a, "threads"_a);
    m.def("few_rows", &few_rows, "x"_a, "rows"_a, "width"_a, "weight"_a, "outs"_a, "bias"_a,
          "low"_a, "rank"_a, "up"_a, "y"_a);
    m.def("attention", &attention, "q"_a, "sizes"_a, "scale"_a, "banks"_a, "causal"_a, "out"_a,
          "lse"_a, "threads"_a);
    m.def("heads", &heads, "sizes"_a, "tables"_a, "eps"_a, "qkv"_a, "q"_a, "k"_a, "brain"_a,
          "threads"_a);
    m.def("heads_backward", &heads_backward, "sizes"_a, "tables"_a, "eps"_a, "qkv"_a, "dq"_a,
          "dk"_a, "dv"_a, "dqkv"_a, "brain"_a, "threads"_a);
    m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "rows"_a, "width"_a, "eps"_a, "z"_a, "brain"_a,
          "threads"_a);
    m.def("rms_norm_backward", &rms_norm_backward, "x"_a, "weight"_a, "dz"_a, "rows"_a, "width"_a,
          "eps"_a, "dx"_a, "brain"_a, "threads"_a);
    m.def("rotate", &rotate, "x"_a, "sizes"_a, "cos"_a, "sin"_a, "out"_a, "brain"_a, "threads"_a);
    m.def("swiglu", &swiglu, "x"_a, "rows"_a, "width"_a, "z"_a, "brain"_a, "threads"_a);
    m.def("swiglu_backward", &swiglu_backward, "x"_a, "dz"_a, "rows"_a, "width"_a, "dx"_a,
          "brain"_a, "threads"_a);
    m.def("warp", &warp, "sources"_a.noconvert(), "outs"_a.noconvert(), "inverses"_a.noconvert(),
          "fill"_a, "threads"_a);
    m.def("resize", &resize, "sources"_a.noconvert(), "outs"_a.noconvert(), "across"_a.noconvert(),
          "down"_a.noconvert(), "down_first"_a, "threads"_a);
    m.def("patchify", &patchify, "sources"_a.noconvert(), "out"_a.noconvert(),
          "table"_a.noconvert(), "patch"_a, "merge"_a, "taps"_a, "threads"_a,
          "inverses"_a.noconvert() = nb::none(), "fill"_a = 0.0f);
    m.def("sample", &sample, "logits"_a.noconvert(), "temperature"_a.noconvert(),
          "seed"_a.noconvert(), "position"_a.noconvert(), "ids"_a.noconvert(),
          "logprob"_a.noconvert(), "logsumexp"_a.noconvert(), "entropy"_a.noconvert(), "threads"_a);
    m.def("token_logprob_forward", &token_logprob_forward, "logits"_a.noconvert(),
          "ids"_a.noconvert(), "logprob"_a.noconvert(), "logsumexp"_a.noconvert(),
          "entropy"_a.noconvert(), "threads"_a);
    m.def("token_logprob_backward", &token_logprob_backward, "logits"_a.noconvert(),
          "ids"_a.noconvert(), "logsumexp"_a.noconvert(), "entropy"_a.noconvert(),
          "grad_logprob"_a.noconvert(), "grad_logsumexp"_a.noconvert(),
          "grad_entropy"_a.noconvert(), "grad"_a.noconvert(), "threads"_a);
}
