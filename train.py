"""The one entry point: `python train.py COMMAND`, the same as the installed `rwkv-train COMMAND`."""

from rwkv_train.cli import main

if __name__ == "__main__":
    main()
