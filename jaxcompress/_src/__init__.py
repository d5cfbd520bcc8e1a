"""What the library is made of; `jaxcompress` names what is public."""
