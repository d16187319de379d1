// Runs a package that AOTInductor compiled, in a process without Python:
//   run_package OPERATORS PACKAGE SIZE...   with float32 images of these sizes on standard input, results on standard output
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
    if (dlopen(arguments[1], RTLD_NOW) == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    std::vector<int64_t> sizes;
    for (int i = 3; i < count; ++i) sizes.push_back(std::atoll(arguments[i]));
    at::Tensor x = at::empty(sizes, at::kFloat);
    if (std::fread(x.mutable_data_ptr(), sizeof(float), x.numel(), stdin) != static_cast<size_t>(x.numel())) return 2;
    torch::inductor::AOTIModelPackageLoader package(arguments[2]);
    const at::Tensor y = package.run({x})[0].contiguous();
    return std::fwrite(y.const_data_ptr(), sizeof(float), y.numel(), stdout) == static_cast<size_t>(y.numel()) ? 0 : 3;
}
