"""One module per format: COCO JSON, Pascal VOC XML, YOLO.

Imports the rest of `data`, but for what opens data sets.
"""
