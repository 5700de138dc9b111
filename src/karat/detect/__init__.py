"""Detection and instance segmentation (SPEC §3): a plain ViT, windowed and global, under torchvision's Mask R-CNN.

attention.py and trunk.py make a backbone of a timm ViT with any attention of karat's; pyramid.py wraps a simple feature
pyramid around any trunk; detector.py puts torchvision's Mask R-CNN on it. coco.py and data.py read COCO files, views.py
and loader.py make batches of them, evaluate.py measures. task.py gives it all to the training loop that
classification has (`karat.train.engine`).
"""
