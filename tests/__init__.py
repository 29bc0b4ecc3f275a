"""Tests mirror the rooms: that of ``trainer/data/packing.py`` is ``tests/trainer/data/test_packing.py``, that of
``rlhf_kernels/losses/kto.py`` is ``tests/kernels/losses/test_kto.py``. ``contracts`` looks at the whole house.
"""
