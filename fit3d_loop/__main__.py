"""``python -m fit3d_loop``."""

from fit3d_loop.cli import main

if __name__ == "__main__":
    main()
