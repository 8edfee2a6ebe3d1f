"""Keys and tokens, for `python -m serve.tokens FILE NAME`: see medray.serving.tokens."""

from medray.serving.tokens import main

if __name__ == "__main__":
    main()
