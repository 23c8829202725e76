"""Bundles that are elsewhere: on the Hugging Face Hub, a web server, S3. Files are fetched when they are needed."""

__all__: list[str] = []
