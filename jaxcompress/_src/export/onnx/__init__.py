"""ONNX files from jaxprs, with compressed leaves in their stored form."""
