// Runs every operation on random shapes, on every instruction set of this machine: self_test [cases per operation].
#include <cstdio>
#include <cstdlib>

#include "check.h"

int main(int argc, char** argv) {
    using namespace bitwright::test;
    const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 200;
    std::printf("instruction sets:");
    for (const InstructionSet& isa : instruction_sets()) std::printf(" %s", isa.name);
    std::printf("\n");
    const struct {
        const char* name;
        void (*run)(int64_t);
    } tests[] = {
        {"linear", test_linear},     {"grouped linear", test_grouped}, {"decoded linear", test_decoded},
        {"panels", test_panels},     {"conv2d", test_conv},            {"add", test_add},
        {"pool", test_pool},         {"codes", test_codes},       {"gradients", test_straight_through}, {"moments", test_moments},
    };
    for (const auto& test : tests) {
        test.run(cases);
        std::printf("%s: %lld cases equal\n", test.name, static_cast<long long>(cases));
        std::fflush(stdout);
    }
    test_refusals();
    std::printf("refusals: as stated\n");
    return 0;
}
