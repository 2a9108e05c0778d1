"""Fine-tune ResNet50 on labelled images with Ray Train; bulk-classify images into Parquet with Ray Data."""

__version__ = "0.1.0"
