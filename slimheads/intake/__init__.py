"""What a checkpoint's files say, judged before transformers reads them."""
