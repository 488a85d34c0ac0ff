"""The optional extension; everything else is in setup.cfg."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "nemo_image.embedders.preprocess._resize",
            ["nemo_image/embedders/preprocess/_resize.c"],
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
            # A sum that is rounded once less, as a compiler may choose on its own, would give other weights.
            extra_compile_args=["-O3", "-ffp-contract=off"],
            py_limited_api=True,
            optional=True,  # without a compiler, torch resizes
        )
    ]
)
