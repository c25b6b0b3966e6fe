"""The compiled kernel, here because its wheel's tag hangs on the Python that builds it.

Free-threaded Python has no abi3: setuptools refuses the tag there and would end the installation.
The kernel is optional, so that one without a compiler or Python's headers goes on without it.
"""

import sysconfig

from setuptools import Extension, setup

KERNEL = Extension(
    "lora_export._kernel",
    ["lora_export/_kernel.c"],
    # Its vectors never cross a call, so what GCC says of passing them does not matter. Debugging
    # information would name the folders of the machine that built it.
    extra_compile_args=["-O3", "-g0", "-Wno-psabi"],
    py_limited_api=True,
    optional=True,
)
ABI3 = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp311"}

setup(ext_modules=[KERNEL], options={"bdist_wheel": ABI3})
