package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// certificates HOURS FOLDER ADDRESS...: writes ca.crt, apiserver.crt and apiserver.key for an API server at these addresses,
// good from so many hours ahead, and sa.key, which signs the tokens of service accounts.
func certificates(args []string) error {
	if len(args) < 3 {
		return fmt.Errorf("usage: kubernetes certificates HOURS FOLDER ADDRESS...")
	}
	hours, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	folder := args[1]
	template := func(name string, serial int64) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial),
			Subject:      pkix.Name{CommonName: name},
			NotBefore:    time.Now().Add(time.Duration(hours)*time.Hour - time.Minute),
			NotAfter:     time.Now().Add(24 * time.Hour * 365),
		}
	}
	ca := template("test-ca", 1)
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign
	server := template("kube-apiserver", 2)
	server.KeyUsage, server.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	server.DNSNames = []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"}
	for _, address := range args[2:] {
		server.IPAddresses = append(server.IPAddresses, net.ParseIP(address))
	}
	keys := make([]*ecdsa.PrivateKey, 3)
	for i := range keys {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		keys[i] = key
	}
	caBytes, err := x509.CreateCertificate(rand.Reader, ca, ca, keys[0].Public(), keys[0])
	if err != nil {
		return err
	}
	serverBytes, err := x509.CreateCertificate(rand.Reader, server, ca, keys[1].Public(), keys[0])
	if err != nil {
		return err
	}
	write := func(name, kind string, bytes []byte, err error) error {
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(folder, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: bytes}), 0o600)
	}
	if err := write("ca.crt", "CERTIFICATE", caBytes, nil); err != nil {
		return err
	}
	if err := write("apiserver.crt", "CERTIFICATE", serverBytes, nil); err != nil {
		return err
	}
	for i, name := range []string{"apiserver.key", "sa.key"} {
		// The tokens that there are stay good.
		if _, err := os.Stat(filepath.Join(folder, name)); err == nil && name == "sa.key" {
			continue
		}
		bytes, err := x509.MarshalECPrivateKey(keys[i+1])
		if err := write(name, "EC PRIVATE KEY", bytes, err); err != nil {
			return err
		}
	}
	return nil
}
