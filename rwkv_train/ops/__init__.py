"""The recurrences of RWKV and what lies between its matrix products, one function each, with several backends.

reference.py is the specification in plain torch; wkv4*.py and wkv7*.py hold one backend a file; native/ the C++ and
CUDA that build_cpu.py and build_cuda.py build. Nothing here knows of models.
"""
