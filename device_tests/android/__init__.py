"""The target ``android``: on a phone through adb, else its ARM kernels under qemu-user."""
