"""The target ``qnn``: Qualcomm's NPU library, here as an emulation, on Snapdragon for real."""
