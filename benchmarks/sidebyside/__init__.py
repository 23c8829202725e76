"""What `decode.py` is made of: model files, the processes that are measured, the report."""
