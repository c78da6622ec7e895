// Runs an AOTInductor package with operators of this library, without Python:
//
//   run_package LIBRARY PACKAGE CASES
//
// LIBRARY is libdeep_gemm_ops.so, PACKAGE and CASES are what make_package.py writes: the compiled model, and inputs with
// the results that Python got. The program exits with 1 where a result differs by more than rounding.
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/serialize.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Compiled code keeps FP32 between fused operations where eager mode rounds to BF16, and some FP8 roundings then turn out
// otherwise: 4.4e-3 on a CPU.
constexpr double kLargestDifference = 2e-2;

// Registers torch.ops.deep_gemm: loading is all that has to be done.
void load_operators(const std::string& path) {
    if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
    size_t count = 0;
    for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
        count += name.name.rfind("deep_gemm::", 0) == 0;
    }
    if (count == 0) throw std::runtime_error(path + " registers no deep_gemm operators");
    std::printf("%zu operators of deep_gemm registered\n", count);
}

// A list of tensors that torch.save has written: input, result, input, result, ...
std::vector<at::Tensor> read_tensors(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot read " + path);
    const std::vector<char> data{std::istreambuf_iterator<char>(file), {}};
    const c10::IValue list = torch::pickle_load(data);
    std::vector<at::Tensor> tensors;
    for (const c10::IValue& value : list.toListRef()) tensors.push_back(value.toTensor());
    return tensors;
}

int run(const std::string& library, const std::string& package, const std::string& cases) {
    load_operators(library);
    torch::inductor::AOTIModelPackageLoader model(package);
    const std::string device = model.get_metadata().at("AOTI_DEVICE_KEY");
    std::printf("%s loaded, compiled for %s\n", package.c_str(), device.c_str());

    const std::vector<at::Tensor> tensors = read_tensors(cases);
    int failures = 0;
    for (size_t i = 0; i + 1 < tensors.size(); i += 2) {
        const std::vector<at::Tensor> inputs{tensors[i].to(device)};
        const auto start = std::chrono::steady_clock::now();
        const at::Tensor result = model.run(inputs).at(0).cpu();  // the copy waits for the device
        const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
        const at::Tensor expected = tensors[i + 1].to(at::kDouble);
        const double norm = expected.norm().item<double>();
        const double difference = (result.to(at::kDouble) - expected).norm().item<double>() / norm;
        // Written so that NaN fails, too.
        const bool good = result.sizes() == expected.sizes() && difference <= kLargestDifference;
        std::printf("%lld tokens: relative difference from Python %.2e, %.2f ms%s\n",
                    static_cast<long long>(inputs[0].size(0)), difference, elapsed.count(), good ? "" : "  WRONG");
        failures += !good;
    }
    std::printf(failures == 0 ? "all results agree\n" : "%d results differ\n", failures);
    return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) {
        std::fprintf(stderr, "usage: %s LIBRARY PACKAGE CASES\n", argv[0]);
        return 2;
    }
    std::setvbuf(stdout, nullptr, _IOLBF, 0);  // lines appear in order with those of stderr, also where it crashes
    try {
        return run(argv[1], argv[2], argv[3]);
    } catch (const c10::Error& error) {
        std::fprintf(stderr, "%s\n", error.what_without_backtrace());
        return 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
