// The part of cuBLASLt's C interface that gemm.cpp calls, declared here because the library is
// found in the process and not at build time: a toolkit without cublasLt.h builds the same module.
// Names, values and layouts are those of NVIDIA's header, equal in versions 12 and 13; descriptors,
// whose size differs between versions, are made by the library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cosmos3::gemm {

constexpr int kSuccess = 0;                                         // CUBLAS_STATUS_SUCCESS
constexpr int kComputeFloat32 = 68;                                 // CUBLAS_COMPUTE_32F
constexpr int kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14;           // cudaDataType
constexpr std::int32_t kTranspose = 1;                              // CUBLAS_OP_T
constexpr int kDescTransposeA = 3;                                  // CUBLASLT_MATMUL_DESC_TRANSA
constexpr int kMaxWorkspaceBytes = 1, kReductionMask = 3;           // CUBLASLT_MATMUL_PREF_*
constexpr int kMinAlignmentA = 5, kMinAlignmentD = 8;               // of A, B, C, D in bytes
constexpr std::uint32_t kReduceInComputeType = 2;                   // CUBLASLT_REDUCTION_SCHEME_*
constexpr int kAttributes = 9, kInnerShape = 7, kClusterShape = 8;  // CUBLASLT_ALGO_CONFIG_*

using Handle = void*;
using Descriptor = void*;  // of an operation, a matrix layout or a preference

// cublasLtMatmulAlgo_t: "can be trivially serialized and later restored for use with the same
// version of cuBLAS library".
struct Algorithm {
    std::uint64_t data[8];
};

struct HeuristicResult {  // cublasLtMatmulHeuristicResult_t
    Algorithm algorithm;
    std::size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(HeuristicResult) == 96, "cublasLtMatmulHeuristicResult_t has 96 bytes");

// The functions of the same name in the library, in the order gemm.cpp loads them.
struct Library {
    std::size_t (*GetVersion)();
    int (*Create)(Handle*);
    int (*MatmulDescCreate)(Descriptor*, int compute, int scale_type);
    int (*MatmulDescSetAttribute)(Descriptor, int attribute, const void*, std::size_t);
    int (*MatrixLayoutCreate)(Descriptor*, int type, std::uint64_t rows, std::uint64_t columns,
                              std::int64_t leading);
    int (*MatmulPreferenceCreate)(Descriptor*);
    int (*MatmulPreferenceDestroy)(Descriptor);
    int (*MatmulPreferenceSetAttribute)(Descriptor, int attribute, const void*, std::size_t);
    int (*MatmulAlgoGetHeuristic)(Handle, Descriptor operation, Descriptor a, Descriptor b,
                                  Descriptor c, Descriptor d, Descriptor preference, int requested,
                                  HeuristicResult*, int* returned);
    int (*MatmulAlgoCheck)(Handle, Descriptor operation, Descriptor a, Descriptor b, Descriptor c,
                           Descriptor d, const Algorithm*, HeuristicResult*);
    int (*MatmulAlgoConfigGetAttribute)(const Algorithm*, int attribute, void*, std::size_t,
                                        std::size_t* written);
    int (*MatmulAlgoConfigSetAttribute)(Algorithm*, int attribute, const void*, std::size_t);
    int (*Matmul)(Handle, Descriptor operation, const void* alpha, const void* a, Descriptor,
                  const void* b, Descriptor, const void* beta, const void* c, Descriptor, void* d,
                  Descriptor, const Algorithm*, void* workspace, std::size_t, void* stream);
};

}  // namespace cosmos3::gemm
