"""Class indices of any integer dtype."""

import numpy as np

from nbloss.cuda.intrinsics import device_function, load_integer

# By the code that a kernel is given; 0 is for no labels.
LABEL_TYPES = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
LABEL_CODE = {np.dtype(t): code for code, t in enumerate(LABEL_TYPES, 1)}
I1_CODE, U1_CODE, I2_CODE, U2_CODE, I4_CODE, U4_CODE, I8_CODE, U8_CODE = LABEL_CODE.values()
I1, U1, I2, U2, I4, U4, I8, U8 = (t(0) for t in LABEL_TYPES)
ONE_BELOW, TWO_BELOW = np.int64(-1), np.int64(-2)


@device_function
def load_label(address, code, ignore):
    """A class index as int64; one beyond int64 as a negative number that is not `ignore`."""
    if code == I8_CODE:
        return load_integer(address, I8)
    if code == I4_CODE:
        return load_integer(address, I4)
    if code == U1_CODE:
        return load_integer(address, U1)
    if code == I1_CODE:
        return load_integer(address, I1)
    if code == I2_CODE:
        return load_integer(address, I2)
    if code == U2_CODE:
        return load_integer(address, U2)
    if code == U4_CODE:
        return load_integer(address, U4)
    label = load_integer(address, U8)
    return label if label >= 0 else TWO_BELOW if ignore == ONE_BELOW else ONE_BELOW
