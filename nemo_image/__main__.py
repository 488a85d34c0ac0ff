"""``python -m nemo_image``: the command line."""

from nemo_image.cli import main

if __name__ == "__main__":
    main()
