"""Raw kernels, installed as `cosmos3_fast.kernels`: Triton, one operation a file; references."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is cosmos3_fast.kernels; PyPI's package 'kernels' is another one "
        "(hint: run from outside the source folder, or install with pip install -e .)"
    )
