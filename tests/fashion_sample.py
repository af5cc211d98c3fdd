"""A stand-in for Fashion-MNIST, where it is not installed: 400 of its images, again and again, in files as large as its own.

The images, in tests/fashion_mnist, are the first 30 of each class for training, and the first 10 for testing, of Fashion-MNIST
(https://github.com/zalandoresearch/fashion-mnist), copyright 2017 Zalando SE, MIT License. Results on them mean nothing."""
import gzip, sys
from pathlib import Path

sample = Path(__file__).parent/'fashion_mnist'

def repeat(name, n, header, folder):
    "Write `n` images, or labels, made of those in the sample's file `name`"
    data = gzip.decompress((sample/name).read_bytes())
    body = data[header:]
    size = len(body)//int.from_bytes(data[4:8], 'big')
    whole = (body*(n*size//len(body)+1))[:n*size]
    with gzip.open(folder/name, 'wb', compresslevel=1) as f: f.write(data[:4] + n.to_bytes(4, 'big') + data[8:header] + whole)

def expand(folder):
    "Write the four files into `folder`, unless they are there"
    folder.mkdir(parents=True, exist_ok=True)
    for part,n in ('train',60_000),('t10k',10_000):
        for kind,header in ('images-idx3',16),('labels-idx1',8):
            name = f'{part}-{kind}-ubyte.gz'
            if not (folder/name).exists(): repeat(name, n, header, folder)
    return folder

if __name__=='__main__': expand(Path(sys.argv[1]))
